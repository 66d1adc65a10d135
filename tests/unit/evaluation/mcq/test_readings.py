"""The readings of multiple choice against chance and against each other, by hand and by scipy."""

from __future__ import annotations

import itertools
import json

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.mcq.readings import MEASURES, chance_p, compare_readings, readings_table

SETTINGS = load_config("smoke").evaluation  # 95 %


def answered(rights, *, n=8, options=4, abstained=(), task="shipped", **letters):
    """Answers whose right letter is A: strict ones right by `rights`, and the letters given for other readings."""
    return [
        {"task": task, "id": f"q{i}", "options": dict(zip("ABCD"[:options], "wxyz", strict=False)), "answer": "A"}
        | {"correct": i in rights, "abstained": i in abstained}
        | {reading: given[i] for reading, given in letters.items() if given[i] != "-"}
        for i in range(n)
    ]


def test_chance_equals_the_exact_binomial_test():
    from scipy.stats import binomtest

    # 24 of 60 questions of four options: 15 would be chance.
    assert chance_p(24, [4] * 60) == pytest.approx(0.0106407, abs=1e-7)
    for right in range(0, 21, 4):
        assert chance_p(right, [5] * 20) == pytest.approx(binomtest(right, 20, 0.2).pvalue)


@pytest.mark.parametrize("options", [[2, 4], [4, 4, 5, 3], [2, 3, 4, 5, 5, 4]])
def test_chance_with_mixed_options_counts_every_outcome(options):
    outcomes = dict.fromkeys(range(len(options) + 1), 0.0)
    for guesses in itertools.product((0, 1), repeat=len(options)):  # every way to guess them all
        probability = 1.0
        for right, number in zip(guesses, options, strict=True):
            probability *= 1 / number if right else 1 - 1 / number
        outcomes[sum(guesses)] += probability
    for right, likelihood in outcomes.items():
        expected = sum(p for p in outcomes.values() if p <= likelihood * (1 + 1e-7))
        assert chance_p(right, options) == pytest.approx(expected)


def test_one_question_of_another_size_hardly_moves_the_p():
    from scipy.stats import binomtest

    assert chance_p(30, [4] * 59 + [5]) == pytest.approx(binomtest(30, 60, 0.25).pvalue, rel=0.15)


def test_three_readings_say_what_they_measure_and_how_sure():
    base = answered({0}, abstained=range(1, 8), letter="AAABBBBB", likelihood="ABBBBBBB")
    tuned = answered(range(8), letter="AAAAAAAA", likelihood="ABBBBBBB")
    found = compare_readings(base, tuned, SETTINGS)
    assert [reading["reading"] for reading in found] == list(MEASURES) == ["strict", "letter", "likelihood"]
    strict, letter, likelihood = found
    assert all((reading["n"], reading["chance"]) == (8, 0.25) for reading in found)
    assert (letter["base"]["value"], letter["tuned"]["value"]) == (3 / 8, 1)
    assert letter["difference"]["p"] == pytest.approx(2 / 2**5) and letter["tuned"]["p"] == pytest.approx(0.25**8)
    assert likelihood["difference"]["p"] == 1 and likelihood["base"] == likelihood["tuned"]
    assert [side["abstained"] for side in (strict["base"], strict["tuned"], letter["base"])] == [7, 0, 0]
    assert json.loads(json.dumps(found)) == found, "metrics.json holds it"


def test_abstained_questions_are_no_worse_than_guessing():
    base, tuned = answered({0}, abstained=range(1, 8)), answered((), abstained=range(8))
    (strict,) = compare_readings(base, tuned, SETTINGS)
    assert strict["base"]["p"] == pytest.approx(0.25), "one answered, rightly: 1 in 4"
    assert strict["tuned"]["p"] is None and strict["tuned"]["value"] == 0 and strict["n"] == 8


def test_answers_of_earlier_runs_have_the_strict_reading_alone():
    old, new = answered({0, 1}), answered({0}, letter="AAAAAAAA")
    assert [reading["reading"] for reading in compare_readings(old, new, SETTINGS)] == ["strict"]
    assert compare_readings([], [], SETTINGS) == [] and readings_table([]).empty


def test_a_reading_counts_the_questions_that_both_have():
    base, tuned = answered((), letter="AB------"), answered((), letter="A-AAAAAA")
    letter = compare_readings(base, tuned, SETTINGS)[1]
    assert (letter["n"], letter["base"]["value"]) == (1, 1)


def test_each_task_has_its_own_readings_and_chance():
    base = [*answered({0}, task="four"), *answered({0}, task="two", options=2, n=6)]
    found = compare_readings(base, base, SETTINGS)
    assert [(reading["task"], reading["n"], reading["chance"]) for reading in found] == [("four", 8, 0.25), ("two", 6, 0.5)]


def test_the_table_of_readings_has_a_line_for_each_model():
    base = answered({0}, abstained=range(1, 8), letter="AAABBBBB", likelihood="ABBBBBBB")
    table = readings_table(compare_readings(base, base, SETTINGS))
    lines = [("shipped", reading, model) for reading in MEASURES for model in ("base", "tuned", "difference")]
    assert list(table.index) == lines
    letter = table.xs("letter", level="reading").droplevel("task")
    assert letter.loc["base", "right"].startswith("0.38 [") and set(letter["questions"]) == {8}
    assert letter["p"].to_dict() == {"base": "0.422", "tuned": "0.422", "difference": "1.000"}
    assert letter["chance"].to_dict() == {"base": "0.25", "tuned": "0.25", "difference": ""}
    assert table["abstained"].xs("tuned", level="model").tolist() == [7, 0, 0]
    unread = answered((), abstained=range(8))
    assert readings_table(compare_readings(unread, unread, SETTINGS)).iloc[0]["p"] == ""
