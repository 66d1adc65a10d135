"""The article's templates word for word, the join of prompt and completion, and the `<think>` parser."""

from __future__ import annotations

import pytest

from medcot_utils.data.prompts import INFERENCE_TEMPLATE, TRAINING_TEMPLATE, inference_prompt, parse_completion, training_text

# As the article prints it, line by line.
PREAMBLE = [
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request.",
    "Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and "
    "accurate response.",
    "",
    "### Instruction:",
    "You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.",
    "Please answer the following medical question.",
    "",
    "### Question:",
    "{}",
    "",
    "### Response:",
]


def test_inference_template_is_the_articles():
    assert INFERENCE_TEMPLATE.split("\n") == [*PREAMBLE, "<think>{}"]


def test_training_template_is_the_articles():
    assert TRAINING_TEMPLATE.split("\n") == [*PREAMBLE, "<think>", "{}", "</think>", "{}"]


@pytest.mark.parametrize(("newline", "end"), [(True, "### Response:\n<think>\n"), (False, "### Response:\n<think>")])
def test_inference_prompt_ends_inside_the_opened_tag(newline, end):
    assert inference_prompt("Why?", newline).endswith(end)
    assert "### Question:\nWhy?\n\n" in inference_prompt("Why?", newline)


@pytest.mark.parametrize("newline", [True, False])
def test_training_text_continues_where_the_prompt_stops(newline):
    text = training_text("Why?", "Because.", "So.", "<eos>")
    assert text.startswith(inference_prompt("Why?", newline))
    rest = text.removeprefix(inference_prompt("Why?", newline))
    assert rest == ("" if newline else "\n") + "Because.\n</think>\nSo.<eos>"


def test_braces_in_a_text_stay_as_they_are():
    text = training_text("set {0} {x}", "{}", "{{}}", "{eos}")
    assert "set {0} {x}" in text and text.endswith("\n{}\n</think>\n{{}}{eos}")
    assert "set {0} {x}" in inference_prompt("set {0} {x}")


@pytest.mark.parametrize(
    ("completion", "thinking", "answer", "closed", "well_formed"),
    [
        ("First this.\n</think>\nThe answer.", "First this.", "The answer.", 1, True),
        ("First this, and never an end", "First this, and never an end", "", 0, False),
        ("<think>\nOpened twice.\n</think>\nAnswer.", "Opened twice.", "Answer.", 1, True),
        ("One.</think>Two.</think>Three.", "One.", "Two.Three.", 2, False),
        ("One.</think>Two.<think>Three.", "One.", "Two.Three.", 1, True),
        ("</think>Answer.", "", "Answer.", 1, False),
        ("Thinking.</think>", "Thinking.", "", 1, False),
        ("Thinking.\n</think> \n ", "Thinking.", "", 1, False),
        ("", "", "", 0, False),
    ],
    ids=["closed", "open", "opened again", "closed twice", "reopened", "no thinking", "no answer", "blank answer", "empty"],
)
def test_completion_of_an_opened_prompt(completion, thinking, answer, closed, well_formed):
    parsed = parse_completion(completion)
    assert (parsed.thinking, parsed.answer, parsed.closed) == (thinking, answer, closed)
    assert parsed.well_formed is well_formed


@pytest.mark.parametrize(
    ("completion", "thinking", "answer", "closed"),
    [
        ("<think>A.</think>B.", "A.", "B.", 1),
        ("  \n<think>\nA.\n</think>\nB.\n", "A.", "B.", 1),
        ("Only an answer.", "", "Only an answer.", 0),
        ("A.</think>B.", "A.", "B.", 1),
        ("<think>A, never closed", "A, never closed", "", 0),
        ("Well: <think>A.</think>B.", "A.", "Well: B.", 1),
        ("<think></think>B.", "", "B.", 1),
        ("<think>A.</think>B.<think>C.</think>D.", "A.", "B.C.D.", 2),
    ],
)
def test_completion_whose_prompt_had_not_opened_the_tag(completion, thinking, answer, closed):
    parsed = parse_completion(completion, opened=False)
    assert (parsed.thinking, parsed.answer, parsed.closed) == (thinking, answer, closed)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("completion", ["</think></think>", "<think><think>a</think></think>b<think>", "<think>"])
def test_no_tag_is_left_in_either_part(completion, opened):
    parsed = parse_completion(completion, opened)
    assert "think>" not in parsed.thinking + parsed.answer


def test_a_training_completion_parses_back_into_its_two_texts():
    text = training_text("Why?", "Because of this.\n\nAnd that.", "So.", "")
    parsed = parse_completion(text.removeprefix(inference_prompt("Why?")))
    assert (parsed.thinking, parsed.answer, parsed.well_formed) == ("Because of this.\n\nAnd that.", "So.", True)
