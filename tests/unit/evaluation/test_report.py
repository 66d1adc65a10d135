"""Report, model card and grading page of runs that hold little, or numbers for names: 'none' stands where there is none."""

from __future__ import annotations

import re

import pytest
from made_up_runs import CONFIG, QUESTIONS, Tags, fill

from medcot_utils import evaluation
from medcot_utils.cli.grading_page import Desk
from medcot_utils.evaluation.report import build_report
from medcot_utils.export.model_card import model_card
from medcot_utils.run.directory import Run

pytestmark = pytest.mark.usefixtures("undrawn_figures")

SCORED = [question["id"] for question in QUESTIONS if question["scored"]]


def shown(page):
    return " ".join(Tags(page).text.split())


def unmeasured(run):
    """Write the metrics of a run in which training rows repeat every scored question and held-out row."""
    nothing = run.read("metrics") | {"n_questions": 0, "metrics": {}, "sampled": None, "n_answered": 0, "answered": {}}
    nothing |= {"n_contaminated": 0, "contaminated": None}
    run.write("metrics", nothing | {"claims": evaluation.judge({}, {}, {})})
    return run


@pytest.fixture(scope="module")
def all_apart(tmp_path_factory):
    """A run whose scored questions were all trained on, with numbers for specialties and a log without a step."""
    numbered = [question | {"specialty": 3 if question["scored"] else "the article's question"} for question in QUESTIONS]
    repeats = [{"train_id": "t9", "question_id": name, "train_question": "Which?", "exact": True} for name in SCORED]
    run = fill(Run.create(tmp_path_factory.mktemp("apart") / "run", CONFIG), repeats, SCORED, questions=numbered)
    assert list(run.read("metrics")["metrics"]) == [
        "eval_loss",
        "perplexity",
        "mcq_accuracy",
        "mcq_abstained",
        "mcq_accuracy_answered",
    ]
    run.write("training_log", [{"step": 6, "train_loss": 1.5}])
    return run


def test_a_run_with_every_question_set_apart_is_reported(all_apart):
    page = build_report(all_apart)
    assert "the rest over 0 held-out questions" in shown(page) and "no question was answered by both models" in shown(page)
    assert f"{len(SCORED)} questions that training rows repeat" in shown(page)
    assert "on 0 held-out questions" in model_card(all_apart) and "No question counts" in model_card(all_apart)


def test_a_number_for_a_specialty_is_a_choice_like_any_other(all_apart):
    page = build_report(all_apart)
    assert Tags(page).options["specialty"] == ["every specialty", "3", "the article's question"]
    assert len(re.findall('data-specialty="3"', page)) == len(SCORED)


def test_a_run_that_measured_nothing_says_none(all_apart):
    run = unmeasured(all_apart)
    assert "What changed No metric was measured." in shown(build_report(run))
    assert "| none |" in model_card(run)


@pytest.mark.parametrize(("specialty", "tags"), [("a & b", ["a &amp; b"]), (7, ["7"]), ("", [])])
def test_the_grading_pages_heading_names_any_specialty(tmp_path, specialty, tags):
    run = Run.create(tmp_path / "run", CONFIG)
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
