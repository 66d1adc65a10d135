"""The scored set: which questions count, and that a run of version 0.1.0 is measured as it was."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from medcot_utils import evaluation
from medcot_utils.run import Run

RUN_OF_0_1_0 = Path(__file__).parents[2] / "data" / "run-of-0.1.0.tar.xz"
ASKED = [{"id": name, "scored": name != "article", "Response": "x"} for name in ("article", "q0", "q1", "q2")]
REPEATS = [
    {"train_id": train, "question_id": name} for train, name in (("t1", "q1"), ("t2", "q1"), ("t3", "article"), ("t4", "row-9"))
]


def answers(*well_formed, n_samples=1):
    return [
        {"id": question["id"], "sample": sample, "well_formed": closed}
        for sample in range(n_samples + 1)
        for question, closed in zip(ASKED, well_formed, strict=True)
    ]


def scored_set(dropped=False, base=(True, True, True, False), tuned=(True,) * 4):
    return evaluation.score(ASKED, answers(*base), answers(*tuned), {"repeats": REPEATS, "repeats_dropped": dropped})


def ids(part):
    return [one.question["id"] for one in part]


def test_questions_that_training_rows_repeat_are_set_apart():
    scored = scored_set()
    assert (ids(scored.asked), ids(scored.counted), ids(scored.apart)) == (["article", "q0", "q1", "q2"], ["q0", "q2"], ["q1"])
    assert scored.repeated_by == {"q1": ["t1", "t2"], "article": ["t3"], "row-9": ["t4"]}


def test_nothing_is_set_apart_if_the_repeats_were_dropped():
    scored = scored_set(dropped=True)
    assert (ids(scored.counted), scored.apart, scored.repeated_by) == (["q0", "q1", "q2"], [], {})


def test_answered_are_counted_questions_all_models_answered():
    assert ids(scored_set().answered) == ["q0"]
    assert ids(scored_set(tuned=(True, False, True, True)).answered) == []


def test_a_question_has_the_greedy_answer_and_the_samples_apart():
    one = scored_set().asked[2]
    assert {label: record["sample"] for label, record in one.greedy.items()} == {"base": 0, "tuned": 0}
    assert {label: [record["sample"] for record in records] for label, records in one.samples.items()} == {
        "base": [1],
        "tuned": [1],
    }
    assert {record["id"] for record in (*one.greedy.values(), *one.samples["base"])} == {"q1"}


def test_answers_to_other_questions_or_as_many_are_refused():
    report = {"repeats": [], "repeats_dropped": True}
    good = answers(True, True, True, True)
    with pytest.raises(ValueError, match="different questions: run notebooks 02 and 06"):
        evaluation.score(ASKED, good, good[:-1], report)
    with pytest.raises(ValueError, match="unlike numbers of samples"):
        evaluation.score(ASKED, good, answers(True, True, True, True, n_samples=2), report)


def test_a_part_without_questions_or_samples_has_no_metrics():
    from medcot_utils.config import load_config

    settings = load_config("smoke").evaluation
    assert evaluation.compare([], [], settings, 1) == {} == evaluation.compare_sampled([], settings, 1)
    without = [{"id": question["id"], "sample": 0, "well_formed": True} for question in ASKED]
    scored = evaluation.score(ASKED, without, without, {"repeats": [], "repeats_dropped": True})
    assert evaluation.compare_sampled(scored.counted, settings, 1) == {}


def numbers(value, path=()):
    """Every leaf of nested JSON by its path, floats to 12 digits."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in pairs for key, leaf in numbers(part, (*path, name)).items()} or {path: value}
    return {path: float(f"{value:.12g}") if isinstance(value, float) else value}


def test_a_run_of_0_1_0_is_measured_as_it_was(tmp_path):
    with tarfile.open(RUN_OF_0_1_0) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    run = Run.open(tmp_path / "old")
    before, settings, seed = run.read("metrics"), run.config.evaluation, run.config.seed
    base_mcq, tuned_mcq = run.read("base_mcq"), run.read("tuned_mcq")

    scored = evaluation.score(run.read("questions"), run.read("base_answers"), run.read("tuned_answers"), run.read("data_report"))
    losses = [record for record in run.read("held_out_loss") if record["id"] not in scored.repeated_by]
    metrics = evaluation.compare(scored.counted, losses, settings, seed)
    mcq_seen = evaluation.mcq.seen_in_training(tuned_mcq, run.read("train_rows"), run.config.dataset)
    metrics |= evaluation.mcq.compare_mcq(base_mcq, tuned_mcq, mcq_seen, settings)
    sampled = evaluation.compare_sampled(scored.counted, settings, seed)
    answered = evaluation.compare(scored.answered, [], settings, seed)
    measured = evaluation.Measured(
        n_questions=len(scored.counted),
        metrics=metrics,
        claims=evaluation.judge(metrics, answered, sampled, scored.repeated_by.get("article", [])),
        notes=[],
        n_samples=run.config.evaluation.n_samples,
        sampled=sampled or None,
        n_answered=len(scored.answered),
        answered=answered,
        n_contaminated=len(scored.apart),
        contaminated=evaluation.compare(scored.apart, [], settings, seed) or None,
    )
    assert numbers(json.loads(json.dumps(measured))) == numbers(before)
    assert list(measured) == list(before) and list(measured["metrics"]) == list(before["metrics"])
