"""The desk behind the grading page: what is judged must be what the run holds."""

from __future__ import annotations

import pytest

from medcot_utils.cli.grading_page import Desk
from medcot_utils.evaluation.grades import GRADES, GradingError


def test_a_judgement_of_answers_made_again_is_not_kept(run_factory, write_all):
    run, question = write_all(run_factory()), {"id": "q0", "scored": True, "Question": "Why?", "Response": "So.", "specialty": ""}
    run.write("questions", [question])
    for name in ("base_answers", "tuned_answers"):
        run.write(name, [{"id": "q0", "sample": 0, "thinking": "", "answer": name}])
    desk = Desk(run, "ann")
    with pytest.raises(GradingError, match="the note holds what looks like a Hugging Face token: remove it"):
        desk.judge(desk.pairs[0], "tie", "see hf_" + "aB3" * 11)
    desk.judge(desk.pairs[0], "tie", "")
    run.write("tuned_answers", [{"id": "q0", "sample": 0, "thinking": "", "answer": "another"}])
    with pytest.raises(GradingError, match="have changed since this page was started: run medcot grade again"):
        desk.judge(desk.pairs[0], "a", "")
    assert len((run.path / GRADES).read_text().splitlines()) == 1
