"""What the strict reading of a multiple choice takes for an answer, and what it does not."""

from __future__ import annotations

import pytest

from medcot_utils.evaluation.mcq.strict import read_answer

OPTIONS = {"A": "Chloride", "B": "Vitamin A", "C": "C. difficile", "D": "HLA_B27"}


@pytest.mark.parametrize(
    ("after_thinking", "expected"),
    [
        # the asked form
        ("Answer: B", "B"),
        ("It carries sodium inwards.\n\nAnswer: C", "C"),
        ("answer: b", "B"),
        ("ANSWER : D", "D"),
        ("Answer:A", "A"),
        ("  Answer: A  ", "A"),
        ("Answer: B.", "B"),
        ("Answer: (B)", "B"),
        # emphasis is how a line looks, not what it says
        ("**Answer: B**", "B"),
        ("**Answer:** B", "B"),
        ("### Answer: `B`", "B"),
        # followed by that option's own text
        ("Answer: A. Chloride", "A"),
        ("Answer: B) vitamin a.", "B"),
        ("Answer: C. C. difficile", "C"),
        ("Answer: **D** (HLA_B27)", "D"),
        # a full-width colon, bracket, letter or stop is the same mark
        ("Answer：B。", "B"),
        ("Answer：（Ｂ）", "B"),
        ("Answer: A、Chloride", "A"),
        ("Answer：B，C", None),
        # the last line of the form decides, whatever comes after it
        ("Answer: B\nThat is because of the receptor.", "B"),
        ("Answer: B\nOn reflection:\nAnswer: C", "C"),
        ("Answer: B\nAnswer: none of them", None),
        ("Answer: B\nAnswer: B or C", None),
        # more than one letter, or something else than this option's text
        ("Answer: B or C", None),
        ("Answer: A, B", None),
        ("Answer: B (not C)", None),
        ("Answer: A. Vitamin A", None),
        ("Answer: C. difficile", None),
        ("Answer: C difficile colitis", None),
        ("Answer: B-cell lymphoma", None),
        ("Answer: D-dimer", None),
        ("Answer: A patient like this needs rest", None),
        ("Answer: Chloride", None),
        # not the asked form
        ("The answer is B", None),
        ("Final answer: B", None),
        ("B", None),
        ("\\boxed{B}", None),
        ("My Answer: B", None),
        ("Answer B", None),
        # no option, no answer
        ("Answer: E", None),
        ("Answer: X", None),
        ("Answer:", None),
        ("Answer: \nB", None),
        ("", None),
    ],
)
def test_an_answer_is_read_only_in_the_requested_form(after_thinking, expected):
    assert read_answer(f"Sodium rushes in.\n</think>\n{after_thinking}", OPTIONS) == expected


@pytest.mark.parametrize(
    "completion",
    [
        "Answer: B",
        "I think.\nAnswer: B\n",
        "I think.\nAnswer: B\n</think>\n",
        "I think.\nAnswer: B\n</think>\nIt is sodium.",
        "I think.</think>Answer: B</think>",
        "I think.</think>So</think>\nAnswer: B",
        "I think.</think>\n<think>More.\nAnswer: B",
        "",
    ],
)
def test_unfinished_or_twice_closed_thinking_has_no_answer(completion):
    assert read_answer(completion, OPTIONS) is None


def test_what_was_thought_does_not_count_against_the_answer():
    assert read_answer("Answer: A. No, wait.\nAnswer: C</think>Answer: D", OPTIONS) == "D"
