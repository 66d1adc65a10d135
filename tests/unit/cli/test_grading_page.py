"""The heading of the grading page, without its server."""

from __future__ import annotations

import pytest

from medcot_utils.cli.grading_page import Desk
from medcot_utils.config import load_config
from medcot_utils.run.directory import Run


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
