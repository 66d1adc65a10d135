"""The scored set: which questions count, and that a run of version 0.1.0 is measured as it was."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from medcot_utils import evaluation
from medcot_utils.evaluation.claims import outcome
from medcot_utils.evaluation.scored_set import force_closing
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
    with pytest.raises(ValueError, match="different numbers of samples"):
        evaluation.score(ASKED, good, answers(True, True, True, True, n_samples=2), report)


def forced_answers(closed_by, n_samples=1, without=()):
    forced = {"closed_by": closed_by, "answer": "It is.", "answer_tokens": 3, "finished": True}
    return [
        record
        | {"thinking": "so", "completion": "so", "answer": ""}
        | ({} if record["sample"] in without else {"forced": forced})
        for record in answers(*[closed_by == "itself"] * 4, n_samples=n_samples)
    ]


def closed_set(base, tuned):
    scored = evaluation.score(ASKED, base, tuned, {"repeats": [], "repeats_dropped": True})
    return force_closing(scored.counted)


def test_with_forced_closing_every_question_has_an_answer():
    one, *_ = closed_set(forced_answers("budget"), forced_answers("itself"))
    base, tuned = one.greedy["base"], one.greedy["tuned"]
    assert (base["answer"], base["well_formed"]) == ("It is.", True) and (tuned["answer"], tuned["well_formed"]) == ("", True)
    assert [record["answer"] for record in one.samples["base"]] == ["It is."]


def test_without_a_forced_answer_there_is_no_such_reading():
    forced = forced_answers("budget")
    assert closed_set(forced, forced_answers("budget", without=(0, 1))) == []
    assert len(closed_set(forced, forced)) == 3
    # If the sampled answers alone lack it, the greedy ones have it all the same.
    greedy_alone = closed_set(forced, forced_answers("budget", without=(1,)))
    assert len(greedy_alone) == 3 and [one.samples for one in greedy_alone] == [{}] * 3


def test_a_part_without_questions_or_samples_has_no_metrics():
    from medcot_utils.config import load_config

    settings = load_config("smoke").evaluation
    assert evaluation.compare([], [], settings, 1) == {} == evaluation.compare_sampled([], settings, 1)
    without = [{"id": question["id"], "sample": 0, "well_formed": True} for question in ASKED]
    scored = evaluation.score(ASKED, without, without, {"repeats": [], "repeats_dropped": True})
    assert evaluation.compare_sampled(scored.counted, settings, 1) == {}


LENGTHS = ("thinking_tokens", "thinking_words", "answer_tokens", "answer_words", "completion_words")


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
    before, settings = run.read("metrics"), run.config.evaluation
    base_mcq, tuned_mcq = run.read("base_mcq"), run.read("tuned_mcq")

    scored = evaluation.score(run.read("questions"), run.read("base_answers"), run.read("tuned_answers"), run.read("data_report"))
    mcq_seen = evaluation.mcq.seen_in_training(tuned_mcq, run.read("train_rows"), run.config.dataset)
    mcq_metrics = evaluation.mcq.compare_mcq(base_mcq, tuned_mcq, mcq_seen, settings)
    measured = json.loads(json.dumps(evaluation.measure(scored, run.read("held_out_loss"), mcq_metrics, run.config)))

    assert [(one["claim"].split(" (")[0][:6], outcome(one)) for one in measured.pop("claims")] == [
        (one["claim"].split(" (")[0][:6], outcome(one)) for one in before.pop("claims")
    ]
    tables = ("metrics", "sampled", "answered", "contaminated")
    for name, metric in [item for table in tables for item in (measured[table] or {}).items()]:
        assert name in LENGTHS or "cut" not in metric
        metric.pop("cut", None)  # later: what a budget cut
    for table in tables:
        assert (measured[table] or {}).pop("copied", None) is None or "copied" not in before[table]  # later: a metric
    assert numbers(measured) == numbers(before)
    assert list(measured) == list(before) and list(measured["metrics"]) == list(before["metrics"])
