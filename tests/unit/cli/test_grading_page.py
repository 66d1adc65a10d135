"""The desk behind the grading page: what is judged must be what the run holds, and its heading names it."""

from __future__ import annotations

import pytest

from medcot_utils.cli.grading_page import Desk
from medcot_utils.config import load_config
from medcot_utils.evaluation.grades import GRADES, GradingError
from medcot_utils.run.directory import Run


def test_a_judgement_of_answers_made_again_is_not_kept(run_factory, write_all):
    run, question = write_all(run_factory()), {"id": "q0", "scored": True, "Question": "Why?", "Response": "So.", "specialty": ""}
    run.write("questions", [question])
    for name in ("base_answers", "tuned_answers"):
        run.write(name, [{"id": "q0", "sample": 0, "thinking": "", "answer": name}])
    desk = Desk(run, "ann")
    desk.judge(desk.pairs[0], "tie", "")
    run.write("tuned_answers", [{"id": "q0", "sample": 0, "thinking": "", "answer": "another"}])
    with pytest.raises(GradingError, match="made again since this page was started: start medcot grade again"):
        desk.judge(desk.pairs[0], "a", "")
    assert len((run.path / GRADES).read_text().splitlines()) == 1


@pytest.mark.parametrize(("specialty", "tags"), [("a & b", ["a &amp; b"]), (7, ["7"]), ("", [])])
def test_the_heading_names_any_specialty(tmp_path, specialty, tags):
    run = Run.create(tmp_path / "run", load_config("smoke"))
    question = {"id": "q0", "scored": True, "specialty": specialty, "Question": "Which valve?", "Response": "The mitral."}
    run.write("questions", [question])
    for name in ("train_rows", "held_out_rows"):
        run.write(name, lambda file: file.write_bytes(b"rows"))
    run.write("adapter", lambda folder: (folder / "weights.bin").write_bytes(b"0"))
    for name in ("base_answers", "tuned_answers"):
        run.write(name, [{"id": "q0", "sample": 0, "thinking": "so", "answer": name}])
    desk = Desk(run, "grader")
    heading = desk.heading(desk.next_pair())
    assert heading.count('class="tag"') == len(tags) and all(f">{tag}</span>" in heading for tag in tags)
