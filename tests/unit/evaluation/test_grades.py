"""Blind grading without the page: who is A, what is kept, what is counted, and what the numbers are."""

from __future__ import annotations

import os
import socket

import pytest

from medcot_utils.cli.grading_page import Desk, serve
from medcot_utils.cli.web import HOST
from medcot_utils.config import load_config
from medcot_utils.evaluation.grades import (
    GRADES,
    GradingError,
    cohen_kappa,
    describe_grades,
    read_grades,
    read_pairs,
    summarize_grades,
)
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import RunError

QUESTIONS = 12


def records(tag, count=QUESTIONS):
    ids = ["article", *(f"q{i}" for i in range(count))]
    answers = {"greedy": 0, "sampled": 1}
    return [
        {"id": name, "sample": sample, "thinking": f"{tag} thinks of {name}, {how}", "answer": f"{tag} on {name}, {how}"}
        for how, sample in answers.items()
        for name in ids
    ]


def fill(run, base="first", tuned="second", count=QUESTIONS):
    """Questions (the one shown only comes first, as notebook 02 writes it) and both models' answers, without a model."""
    questions = [
        {"id": r["id"], "scored": r["id"] != "article", "specialty": "", "Question": r["id"] + "?", "Response": "It."}
        for r in records("", count)
        if not r["sample"]
    ]
    run.write("questions", questions)
    run.write("base_answers", records(base, count))
    for name in ("train_rows", "held_out_rows"):
        run.write(name, lambda path: path.write_bytes(b"rows"))
    run.write("data_report", {"repeats": [], "repeats_dropped": False})
    run.write("adapter", lambda folder: (folder / "weights.bin").write_text(tuned))
    run.write("tuned_answers", records(tuned, count))
    return run


@pytest.fixture
def run(run_factory):
    return fill(run_factory())


def judge(run, verdicts, grader="grader"):
    """`judge(run, {"q0": "tuned", ...})`: one click each."""
    desk = Desk(run, grader)
    pairs = {pair.id: pair for pair in desk.pairs}
    for name, verdict in verdicts.items():
        shown = pairs[name].shown
        desk.judge(pairs[name], "ab"[shown.index(verdict)] if verdict in shown else verdict, "")
    return desk


# --- who is A ------------------------------------------------------------------------------------------------------


def test_the_sides_are_a_coin_by_seed_and_question_alone(run):
    sides = {pair.id: pair.shown for pair in read_pairs(run)}
    assert {frozenset(shown) for shown in sides.values()} == {frozenset({"base", "tuned"})}
    run.write("questions", run.read("questions")[::-1])
    assert {pair.id: pair.shown for pair in read_pairs(run)} == sides, "the order of the questions plays no part"
    seeds = [{p.id: p.shown[0] for p in read_pairs(Run(run.path, load_config("smoke", [f"seed={s}"])))} for s in range(40)]
    thrown = [seed[name] for seed in seeds for name in seed]
    assert 0.45 < thrown.count("base") / len(thrown) < 0.55
    assert all(len({seed[name] for seed in seeds}) == 2 for name in sides)


def test_greedy_answers_are_judged_with_unscored_questions_last(run):
    pairs = read_pairs(run)
    assert [pair.id for pair in pairs] == [*(f"q{i}" for i in range(QUESTIONS)), "article"]
    assert {answer["answer"].split(", ")[1] for pair in pairs for answer in pair.answers.values()} == {"greedy"}


def test_the_token_changes_with_every_text_and_hides_the_label(run, tmp_path):
    first = read_pairs(run)
    assert len({pair.token for pair in first} | {pair.digest for pair in first}) > len(first), "digest and token differ"
    swapped = read_pairs(fill(Run.create(tmp_path / "swapped", run.config), base="second", tuned="first"))
    for pair, other in zip(first, swapped, strict=True):
        assert pair.digest != other.digest and pair.token != other.token
    for name, key in (("base_answers", "thinking"), ("tuned_answers", "answer"), ("questions", "Question")):
        changed = run.read(name)
        changed[1][key] += "!"
        run.write(name, changed)
        now = {pair.id: pair.digest for pair in read_pairs(run)}
        assert [pair.id for pair in first if now[pair.id] != pair.digest] == ["q0"]
        first = read_pairs(run)


# --- the file ------------------------------------------------------------------------------------------------------


def test_a_click_is_on_the_disk_when_it_returns(run, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    desk = Desk(run, "Dr. Ü")
    for pair in desk.pairs[:2]:
        synced.clear()
        desk.judge(pair, "tie", "a line\nand \u2028 another")
        assert synced[-1] == (run.path / GRADES).stat().st_size > 0
    first, second = read_grades(run)
    assert (first.id, second.id, first.grader, first.note) == ("q0", "q1", "Dr. Ü", "a line\nand \u2028 another")
    assert first.shown_as_a == desk.pairs[0].shown[0] and first.at.utcoffset().total_seconds() == 0


@pytest.mark.parametrize("cut", [1, 20, 90])
def test_a_cut_off_line_is_set_aside_and_a_new_one_begins(run, capsys, cut):
    desk = judge(run, {"q0": "tuned", "q1": "base"})
    path = run.path / GRADES
    path.write_bytes(path.read_bytes()[:-cut])
    assert [grade.id for grade in read_grades(run)] == (["q0", "q1"] if cut == 1 else ["q0"])
    said = capsys.readouterr().out
    assert said == ("" if cut == 1 else "run/grades.jsonl: 1 line(s) set aside, cut off while being written or altered by hand\n")
    desk.judge(desk.pairs[2], "tie", "")
    assert [grade.id for grade in read_grades(run)][-1] == "q2"
    assert path.read_bytes().count(b"\n") == 3, "nothing was taken out of the file"
    path.write_bytes(b"\0\0\xff" + path.read_bytes())
    assert read_grades(run)[-1].id == "q2"


def test_an_unwritable_file_is_an_error_not_a_judgment(run):
    desk = Desk(run, "grader")
    (run.path / GRADES).mkdir()
    with pytest.raises(OSError):
        desk.judge(desk.pairs[0], "tie", "")
    assert desk.judged == {} and desk.next_pair() is desk.pairs[0]
    with pytest.raises(GradingError, match=r"grades\.jsonl cannot be read \(Is a directory\): move it away"):
        read_grades(run)


# --- forwards and back -----------------------------------------------------------------------------------------------


def test_forwards_past_what_is_judged_and_back_through_it(run):
    desk = judge(run, {"q0": "tie", "q3": "tie", "q1": "tie"})
    pairs = {pair.id: pair for pair in desk.pairs}
    assert desk.next_pair().id == "q2" and desk.next_pair(pairs["q2"]).id == "q4"
    assert desk.next_pair(pairs["article"]).id == "q2", "what was skipped comes again at the end"
    assert desk.previous_pair(pairs["q2"]).id == "q1"
    assert desk.previous_pair(pairs["q1"]).id == "q3" and desk.previous_pair(pairs["q3"]).id == "q0"
    assert desk.previous_pair(pairs["q0"]) is None
    desk.judge(pairs["q3"], "a", "")
    assert desk.previous_pair(pairs["q2"]).id == "q3", "corrected last"
    again = Desk(run, "grader")
    assert list(again.judged) == list(desk.judged) and again.next_pair().id == "q2"
    assert Desk(run, "somebody else").next_pair().id == "q0"


# --- the result ------------------------------------------------------------------------------------------------------


def test_the_win_rate_is_the_exact_binomial_one(run):
    wins = {f"q{i}": "tuned" if i < 7 else "base" for i in range(10)}
    judge(run, wins | {"q10": "tie", "q11": "both_wrong", "article": "tuned"})
    graded = summarize_grades(run)
    assert graded.counts == {"base": 3, "tuned": 7, "tie": 1, "both_wrong": 1, "split": 0}
    assert (graded.n, graded.of, graded.stale, graded.kappas) == (12, 12, 0, [])
    # 7 of 10: the 0.025 and 0.975 quantiles of Beta(7, 4) and Beta(8, 3); p = 2 * (120 + 45 + 10 + 1) / 1024.
    assert graded.win_rate == pytest.approx({"value": 0.7, "low": 0.34755, "high": 0.93326, "n": 10}, abs=1e-5)
    assert graded.p == pytest.approx(0.34375)
    assert graded.graders == {"grader": {"tuned": 7, "base": 3, "tie": 1, "both_wrong": 1}}
    assert "0.70 [0.35, 0.93] of 10 decided pairs" in describe_grades(graded) and "p = 0.34" in describe_grades(graded)
    narrow = summarize_grades(Run(run.path, load_config("smoke", ["evaluation.confidence_level=0.8"]))).win_rate
    assert narrow["low"] > 0.4 and narrow["high"] < 0.91


def test_nothing_graded_is_none_and_nothing_decided_has_no_rate(run):
    assert summarize_grades(run) is None and describe_grades(None) == "nothing is graded yet"
    judge(run, {"article": "tuned"})
    assert summarize_grades(run) is None, "a question shown only is not counted"
    judge(run, {"q0": "tie"})
    graded = summarize_grades(run)
    assert graded.win_rate is None and graded.p is None and graded.n == 1
    assert "decided" not in describe_grades(graded)


def test_a_question_that_a_training_row_repeats_is_not_counted(run):
    judge(run, {"q0": "tuned", "q1": "base"})
    run.write("data_report", {"repeats": [{"question_id": "q0"}], "repeats_dropped": False})
    graded = summarize_grades(run)
    assert graded.counts["tuned"] == 0 and (graded.win_rate["n"], graded.of) == (1, 11)
    run.write("data_report", {"repeats": [{"question_id": "q0"}], "repeats_dropped": True})
    assert summarize_grades(run).win_rate["n"] == 2


def test_a_graders_later_judgment_replaces_the_earlier_one(run):
    judge(run, {"q0": "tuned", "q1": "tuned"})
    judge(run, {"q0": "base"})
    assert summarize_grades(run).counts | {"split": 0} == {"base": 1, "tuned": 1, "tie": 0, "both_wrong": 0, "split": 0}
    assert len(read_grades(run)) == 3


def test_judgements_of_answers_that_have_changed_do_not_count(run):
    judge(run, {"q0": "tuned", "q1": "base"})
    changed = run.read("tuned_answers")
    changed[1]["answer"] = "another"
    run.write("tuned_answers", changed)
    graded = summarize_grades(run)
    assert graded.counts["tuned"] == 0 and graded.n == 1 and graded.stale == 1
    assert "not counted: 1 judgment(s)" in describe_grades(graded)
    desk = Desk(run, "grader")
    assert desk.stale == 1 and desk.next_pair().id == "q0", "it is asked again"
    judge(run, {"q0": "base"})
    graded = summarize_grades(run)
    assert graded.counts["base"] == 2 and graded.stale == 0


def test_with_several_graders_a_question_counts_once(run):
    judge(run, {"q0": "tuned", "q1": "tuned", "q2": "tie", "q3": "base"}, "x")
    judge(run, {"q0": "tuned", "q1": "base", "q2": "tie"}, "y")
    judge(run, {"q0": "base"}, "z")
    graded = summarize_grades(run)
    assert graded.counts == {"base": 1, "tuned": 1, "tie": 1, "both_wrong": 0, "split": 1}
    assert graded.win_rate["n"] == 2 and graded.n == 4
    found = {kappa.graders: (kappa.value, kappa.n) for kappa in graded.kappas}
    # x and y agree on 2 of 3; by chance on (2 * 1 + 0 * 1 + 1 * 1) / 9.
    assert found[("x", "y")] == (pytest.approx((2 / 3 - 3 / 9) / (1 - 3 / 9)), 3)
    assert found[("x", "z")] == (0.0, 1) and found[("y", "z")] == (0.0, 1)
    assert "Cohen's kappa of x and y: 0.50, on 3 questions" in describe_grades(graded)


def test_kappa_is_cohens():
    first, second = ["yes"] * 25 + ["no"] * 25, ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["tie"] * 3, ["tie"] * 3) is None
    metrics = pytest.importorskip("sklearn.metrics")
    third = ["yes", "no", "perhaps", "no", "yes"] * 10
    assert cohen_kappa(first, third) == pytest.approx(metrics.cohen_kappa_score(first, third))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_run_without_answers_names_the_notebook(run_factory):
    with pytest.raises(RunError, match="run notebook 02_baseline_inference first"):
        serve(run_factory())
    run = fill(run_factory())
    (run.path / "tuned_answers.jsonl").unlink()
    with pytest.raises(RunError, match="run notebook 06_comparison again"):
        serve(run)


def test_no_questions_and_answers_to_others_are_errors(run_factory):
    run = fill(run_factory())
    run.write("questions", [question | {"id": "other"} for question in run.read("questions")[:1]])
    with pytest.raises(GradingError, match="to other questions: run notebooks 02 and 06 again"):
        serve(run)
    run.write("questions", [])
    with pytest.raises(GradingError, match="holds no question: run notebook 02"):
        serve(run)


def test_a_taken_port_and_an_empty_name_are_errors(run):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(GradingError, match=rf"port {port} on 127.0.0.1 cannot be used \(Address already in use\)"):
            serve(run, port)
    with pytest.raises(GradingError, match="needs a name"):
        serve(run, grader=" ")
