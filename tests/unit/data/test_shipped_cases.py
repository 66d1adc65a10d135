"""The shipped cases and multiple-choice questions: schema, counts, lengths, and that nothing is asked twice."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import pytest
from datasets import Dataset
from rapidfuzz import fuzz

from medcot_utils.config import load_config
from medcot_utils.data.contamination import find_repeats, normalize
from medcot_utils.data.prompts import ARTICLE_QUESTION
from medcot_utils.run.artifacts import SHIPPED_CASES

CASES = [json.loads(line) for line in SHIPPED_CASES.read_text(encoding="utf-8").splitlines()]
MCQ = [json.loads(line) for line in SHIPPED_CASES.with_name("mcq.jsonl").read_text(encoding="utf-8").splitlines()]
# Stricter than the 85 and the half from which training rows are dropped.
STRICT = load_config("smoke", ["dataset.near_repeat_similarity=75", "dataset.ngram_overlap=0.2"]).dataset
WORDS = {"Question": (20, 60), "Complex_CoT": (50, 110), "Response": (20, 50)}

_MARKUP = re.compile(r"[<>*#`|_{}\[\]\\]|\]\(|^\s*([-•]|\d+[.)])\s|\s(1[.)]|\(1\))\s|[\r\n\t\u2028\u2029]|  ")


def near(ours: list[str], theirs: list[str]) -> list[dict]:
    train = Dataset.from_dict({"id": [str(i) for i in range(len(ours))], "Question": ours})
    return find_repeats(train, [{"id": str(i), "Question": text} for i, text in enumerate(theirs)], STRICT)


def test_every_case_has_just_the_columns_of_the_schema_as_texts():
    assert {tuple(case) for case in CASES} == {("id", "specialty", "split", "Question", "Complex_CoT", "Response")}
    assert {type(text) for case in CASES for text in case.values()} == {str}


def test_at_least_120_cases_train_and_40_are_held_out():
    assert len(CASES) >= 160
    assert Counter(case["split"] for case in CASES) == {"train": 120, "held_out": 40}


def test_at_least_16_specialties_each_stand_on_both_sides():
    sides = defaultdict(set)
    for case in CASES:
        sides[case["specialty"]].add(case["split"])
    assert len(sides) >= 16
    assert {specialty for specialty, found in sides.items() if found != {"train", "held_out"}} == set()


@pytest.mark.parametrize("rows", [CASES, MCQ], ids=["cases", "mcq"])
def test_ids_are_unique(rows):
    assert [name for name, count in Counter(row["id"] for row in rows).items() if count > 1] == []


@pytest.mark.parametrize("column", WORDS)
def test_texts_have_the_promised_number_of_words(column):
    low, high = WORDS[column]
    assert [case["id"] for case in CASES if not low <= len(case[column].split()) <= high] == []


@pytest.mark.parametrize("column", WORDS)
def test_texts_are_one_paragraph_without_markup(column):
    assert [(case["id"], found[0]) for case in CASES if (found := _MARKUP.search(case[column]))] == []
    assert [case["id"] for case in CASES if case[column] != case[column].strip()] == []


@pytest.mark.parametrize("text", ["**bold**", "a\nb", "- item", "1. item", "<think>", "see [1]", "first 1) this", "two  spaces"])
def test_the_markup_rule_finds(text):
    assert _MARKUP.search(text)


def test_every_question_is_asked_as_one():
    assert [case["id"] for case in CASES if not case["Question"].endswith("?")] == []


def test_no_held_out_question_nearly_repeats_a_training_question():
    train = [case["Question"] for case in CASES if case["split"] == "train"]
    held_out = [case["Question"] for case in CASES if case["split"] == "held_out"]
    assert near(train, held_out) == []
    assert near([*train, held_out[0].upper()], held_out) != []  # the search itself works on these texts


@pytest.mark.parametrize("column", WORDS)
def test_no_two_cases_nearly_repeat_each_other(column):
    texts = [case[column] for case in CASES]
    found = [(one["train_id"], one["question_id"]) for one in near(texts, texts)]
    assert [pair for pair in found if pair[0] != pair[1]] == []
    assert len(found) == len(CASES)


def test_the_articles_question_is_not_among_the_cases():
    assert near([case["Question"] for case in CASES], [ARTICLE_QUESTION]) == []
    assert [case["id"] for case in CASES if "cystometry" in case["Question"].lower()] == []


# --- multiple choice ---------------------------------------------------------------------------------------------------


def test_60_multiple_choice_questions_of_the_schema():
    assert len(MCQ) == 60
    assert {tuple(row) for row in MCQ} == {("id", "question", "options", "answer", "specialty")}
    assert {tuple(row["options"]) for row in MCQ} == {("A", "B", "C", "D")}


def test_every_letter_is_right_15_times():
    assert Counter(row["answer"] for row in MCQ) == dict.fromkeys("ABCD", 15)


def test_options_are_distinct_and_not_empty():
    faulty = [row["id"] for row in MCQ if len({normalize(text) for text in row["options"].values()} - {""}) != 4]
    assert faulty == []


def test_the_right_option_is_not_given_away_by_its_length():
    longest = 0
    for row in MCQ:
        lengths = {letter: len(text) for letter, text in row["options"].items()}
        longest += lengths[row["answer"]] == max(lengths.values())
    assert longest <= len(MCQ) / 3


def test_no_mcq_question_nearly_repeats_a_case_or_another():
    texts = [row["question"] for row in MCQ]
    assert near([case["Question"] for case in CASES], texts) == []
    assert [one for one in near(texts, texts) if one["train_id"] != one["question_id"]] == []


def test_no_case_nearly_contains_an_mcq_question():
    found = [
        (row["id"], case["id"])
        for row in MCQ
        for case in CASES
        if fuzz.partial_ratio(normalize(row["question"]), normalize(case["Question"]), score_cutoff=85)
    ]
    assert found == []
