"""Numbers of multiple-choice answers, by hand; and that no task is pooled with another."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.intervals import share_questions_needed
from medcot_utils.evaluation.mcq.scores import (
    PUBLISHED,
    compare_mcq,
    compare_records,
    overview,
    published_scores,
    score_answers,
    seen_in_training,
    specialty_table,
)
from medcot_utils.evaluation.metrics import METRICS

SETTINGS = load_config("smoke").evaluation


def records(right, abstained=0, n=20, label="base", specialties=2):
    return [
        {"model": label, "task": "shipped", "id": f"q{i}", "specialty": f"s{i % specialties}", "correct": i < right}
        | {"abstained": i >= n - abstained}
        for i in range(n)
    ]


def wilson(p, n, z=1.959963984540054):
    """Wilson 1927, written out: the centre and half-width of the score interval."""
    centre, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def test_accuracy_and_abstentions_have_wilson_intervals():
    found = score_answers(records(right=6, abstained=5))
    assert found["n"] == 20
    for name, share in (("accuracy", 0.3), ("abstained", 0.25)):
        low, high = wilson(share, 20)
        assert found[name]["value"] == pytest.approx(share) and found[name]["n"] == 20
        assert (found[name]["low"], found[name]["high"]) == (pytest.approx(low), pytest.approx(high))
        assert found[name]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 19)), "lm-eval's: n - 1"
    # The textbook's example: 6 of 20.
    assert (round(found["accuracy"]["low"], 3), round(found["accuracy"]["high"], 3)) == (0.145, 0.519)


def test_no_right_answers_still_have_an_interval_above_zero():
    found = score_answers(records(right=0, n=10))["accuracy"]
    assert (found["value"], found["low"]) == (0, 0) and found["high"] == pytest.approx(0.2775, abs=1e-4)
    assert score_answers(records(right=1, n=1))["accuracy"]["stderr"] is None
    wide = score_answers(records(right=6), confidence_level=0.99)["accuracy"]
    assert wide["low"] < score_answers(records(right=6))["accuracy"]["low"]
    with pytest.raises(ValueError, match="no records"):
        score_answers([])


def test_the_specialty_table_counts_right_and_abstained_by_model():
    table = specialty_table(records(right=2), records(right=7, abstained=4, label="tuned"))
    assert list(table.index) == ["s0", "s1"] and list(table["n"]) == [10, 10]
    low, high = wilson(0.4, 10)
    assert table.loc["s0", "tuned: right"] == f"0.40 [{low:.2f}, {high:.2f}]"
    assert table.loc["s0", "base: right"].startswith("0.10 [")
    assert list(table["tuned: abstained"]) == [2, 2] and list(table["base: abstained"]) == [0, 0]
    assert table.loc["s0", "tuned: stderr"] == f"{math.sqrt(0.4 * 0.6 / 9):.2f}"


def of_task(task, *given, **more):
    return [record | {"task": task} for record in records(*given, **more)]


def test_each_task_has_its_own_line_and_is_never_pooled():
    tuned = [*of_task("shipped", 0), *of_task("medqa", 40, n=40)]
    assert overview(tuned) == {
        "shipped, strict": "0.00 right of 20 questions, 0.00 abstained",
        "medqa, strict": "1.00 right of 40 questions, 0.00 abstained",
    }


def read(given, letter, likelihood):
    """Records of a right answer A with the letters of the other readings."""
    return [record | {"answer": "A", "letter": letter, "likelihood": likelihood} for record in given]


def test_the_overview_shows_three_readings_of_one_model():
    some = read(records(right=5, abstained=10), "A", "B")
    del some[0]["letter"]
    assert overview(some) == {
        "shipped, strict": "0.25 right of 20 questions, 0.50 abstained",
        "shipped, letter": "1.00 right of 19 questions",
        "shipped, likelihood": "0.00 right of 20 questions",
    }


def test_specialties_of_few_questions_have_no_table():
    base, tuned = records(right=2), records(right=7, label="tuned")
    assert list(specialty_table(base, tuned).index) == ["s0", "s1"]
    few = [record | {"specialty": "s2"} for record in records(right=2, n=5)]
    renamed = [record | {"id": f"few-{record['id']}"} for record in few]
    assert list(specialty_table([*base, *renamed], [*tuned, *renamed]).index) == ["s0", "s1"], "5 questions show nothing"
    assert specialty_table(few, few).startswith("No table by specialty: none has 6 questions (at most 5)")
    assert specialty_table([], []).startswith("No table by specialty")
    unnamed = [record | {"specialty": ""} for record in base]
    assert isinstance(specialty_table(unnamed, unnamed), str)


def test_no_questions_give_an_empty_result_without_an_error():
    assert "no questions asked" in overview([])["multiple choice"]
    assert compare_mcq([], [], set(), SETTINGS) == {} and seen_in_training([], None, None) == set()
    assert set(published_scores([], []).index.get_level_values("task")) == {"medqa"}


def test_paired_counts_and_mcnemars_exact_p_by_hand():
    base = records(right=0)
    for i in (*range(5), 5):  # right on 6 questions
        base[i]["correct"] = True
    tuned = records(right=0, label="tuned")
    for i in (*range(5), *range(6, 14)):  # both on 5, only tuned on 8
        tuned[i]["correct"] = True
    found = compare_records(base, tuned, SETTINGS)
    assert (found["n"], found["both"], found["only_base"], found["only_tuned"], found["neither"]) == (20, 5, 1, 8, 6)
    # 9 discordant, 1 or fewer (and 8 or more) of them one way: 2 (1 + 9) / 2^9.
    assert found["difference"]["p"] == pytest.approx(20 / 512) and found["difference"]["alpha"] == 0.05
    assert found["difference"]["value"] == pytest.approx(7 / 20)
    # Standard error of the difference: sqrt((9/20 - 0.35^2) / 20) = 0.128, and 1.96 of them on either side.
    assert found["difference"]["low"] == pytest.approx(0.35 - 0.25, abs=0.06)
    assert found["difference"]["high"] == pytest.approx(0.35 + 0.25, abs=0.06)
    assert found["difference"]["needed"] == share_questions_needed(9 / 20, 7 / 20) > 20
    assert found["base"]["value"] == 0.3 and found["tuned"]["value"] == 0.65
    assert found["base"]["low"] == pytest.approx(wilson(0.3, 20)[0])


def test_a_paired_comparison_also_judges_abstentions():
    found = compare_records(records(3, abstained=9), records(3, abstained=2), SETTINGS, key="abstained")
    assert (found["both"], found["only_base"], found["only_tuned"], found["neither"]) == (2, 7, 0, 11)
    assert found["difference"]["p"] == pytest.approx(2 / 2**7)
    same = compare_records(records(3), records(3), SETTINGS)["difference"]
    assert (same["value"], same["p"], same["needed"]) == (0, 1, None) and same["low"] == -same["high"] < 0


def test_a_paired_comparison_requires_the_same_questions():
    from medcot_utils.evaluation.comparison import verdict
    from medcot_utils.evaluation.intervals import format_interval

    with pytest.raises(ValueError, match="different questions"):
        compare_records(records(3), records(3)[::-1], SETTINGS)
    with pytest.raises(ValueError, match="different questions"):
        compare_records(records(3), records(3, n=19), SETTINGS)
    metric = compare_records(records(2), records(18), SETTINGS)
    assert verdict("mcq_accuracy", metric) == "rose, better"
    assert format_interval(metric["base"]).startswith("0.10 [0.03, 0.30]")


def test_the_published_file_names_a_source_for_every_score():
    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    for entry in data["scores"]:
        assert set(data["sources"][entry["source"]]) == {"source", "scoring"} and set(data["questions"]) <= set(entry)


def test_notebook_06_quotes_how_each_published_score_was_scored():
    notebook = (Path(__file__).parents[4] / "notebooks" / "06_comparison.ipynb").read_text(encoding="utf-8")
    notebook = html.unescape(notebook.replace("<wbr>", ""))
    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    for name in {entry["source"] for entry in data["scores"]}:
        assert data["sources"][name]["scoring"] in notebook


def test_published_scores_follow_ours_for_the_same_task_only():
    base = [*of_task("shipped", 20), *of_task("medqa", 6)]
    table = published_scores(base, [*of_task("shipped", 20), *of_task("medqa", 9, abstained=2)]).loc["medqa"]
    assert list(table.index[:2]) == ["base, strict", "tuned, strict"] and list(table["accuracy"][:2]) == [6 / 20, 9 / 20]
    assert table.loc["tuned, strict", "abstained"] == pytest.approx(0.1) and table.loc["tuned, strict", "stderr"] > 0
    published = table.iloc[2:]
    assert published.loc["DeepSeek-R1-Distill-Llama-8B", "accuracy"] == pytest.approx(0.554)
    assert "MedReason" in published.loc["DeepSeek-R1-Distill-Llama-8B", "source"]
    assert published["abstained"].isna().all() and (published["n"] == 1273).all()
    assert published["scoring"].str.contains("better of two totals").all()
    # facts: 1,273 questions give 2.7 points on either side.
    half = (published["high"] - published["low"]) / 2
    assert half.max() == pytest.approx(0.027, abs=0.0005)
    expected = {"medqa": [58.7, 55.4, 69.0, 72.6], "medmcqa": [56.0, 49.0, 57.9, 60.4], "pubmedqa": [75.2, 73.9, 77.7, 79.2]}
    for task, scores in expected.items():
        of_others = published_scores(of_task(task, 3), of_task(task, 3)).loc[task].iloc[2:]
        assert (of_others["accuracy"] * 100).round(1).tolist() == scores


def test_each_reading_beside_published_scores_says_what_it_is():
    base, tuned = (read(of_task("medqa", right), "A", "B") for right in (6, 9))
    table = published_scores(base, tuned).loc["medqa"]
    assert list(table.index[:6]) == [
        f"{side}, {name}" for name in ("strict", "letter", "likelihood") for side in ("base", "tuned")
    ]
    assert list(table["accuracy"][:6]) == [0.3, 0.45, 1, 1, 0, 0]
    assert (
        "leaderboards" in table.loc["base, likelihood", "scoring"] and "leaderboards" not in table.loc["base, letter", "scoring"]
    )
    assert table["abstained"].notna().sum() == 2, "only the strict reading abstains"


def test_medqa_scores_orient_tasks_without_published_ones():
    table = published_scores(of_task("shipped", 6), of_task("shipped", 9))
    assert set(table.index.get_level_values("task")) == {"medqa"}
    assert not [name for name in table.index.get_level_values("model") if name.startswith(("base", "tuned"))]


def test_accuracy_among_both_answered_needs_such_questions():
    base, tuned = records(0, abstained=20), records(5, label="tuned")
    assert set(compare_mcq(base, tuned, set(), SETTINGS)) == {"mcq_accuracy", "mcq_abstained"}
    some = compare_mcq(records(4, abstained=10), records(9, abstained=2, label="tuned"), set(), SETTINGS)
    assert some["mcq_accuracy"]["n"] == 20 and some["mcq_accuracy_answered"]["n"] == 10
    assert (some["mcq_accuracy_answered"]["base"]["value"], some["mcq_accuracy_answered"]["tuned"]["value"]) == (0.4, 0.9)


def test_compared_readings_count_the_questions_read_for_both():
    base = read(records(right=2, abstained=9), "B", "A")
    tuned = read(records(right=7, label="tuned"), "A", "B")
    for record in base[:4]:
        del record["letter"]
    found = compare_mcq(base, tuned, {("shipped", "q19")}, SETTINGS)
    assert list(found) == ["mcq_accuracy", "mcq_abstained", "mcq_letter", "mcq_likelihood", "mcq_accuracy_answered"]
    shares = {name: (metric["n"], metric["base"]["value"], metric["tuned"]["value"]) for name, metric in found.items()}
    assert shares["mcq_letter"] == (15, 0, 1) and shares["mcq_likelihood"] == (19, 1, 0)
    assert shares["mcq_accuracy"] == (19, pytest.approx(2 / 19), pytest.approx(7 / 19))
    assert found["mcq_letter"]["difference"]["p"] == pytest.approx(2 / 2**15)
    assert set(METRICS) > set(found)
