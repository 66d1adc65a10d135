"""Records: what one says of the tokens of an answer, and how it reads with forced closing."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.models.engine import load_tokenizer
from medcot_utils.models.records import CLOSING, make_forced, make_record, show_text, thinking_is_cut, with_forced_closing

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(load_config("smoke").model)


# --- from hand-made ids --------------------------------------------------------------------------------------------


@pytest.fixture
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_finished_record_counts_the_eos_and_not_the_padding(tokenizer, ids):
    thinking, answer = ids("It hurts on breathing.\n"), ids("\nPleurisy.")
    body = [*thinking, *ids("</think>"), *answer]
    padded = [*body, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * 4]
    record = make_record(tokenizer, "prompt", padded, 1.23456)
    assert record["finished"] and record["well_formed"] and record["closed"] == 1
    assert record["completion_tokens"] == len(body) + 1
    assert (record["thinking"], record["answer"]) == ("It hurts on breathing.", "Pleurisy.")
    assert record["thinking_tokens"] == len(ids("It hurts on breathing.")) > 1
    assert record["answer_tokens"] == len(ids("Pleurisy.")) > 1
    assert record["seconds"] == 1.235


def test_a_cut_record_is_not_finished_and_counts_every_token(tokenizer, ids):
    body = ids("It hurts, so I think of")
    record = make_record(tokenizer, "prompt", body, 0)
    assert not record["finished"] and not record["well_formed"]
    assert record["completion_tokens"] == len(body)
    assert (record["thinking"], record["answer"], record["answer_tokens"]) == ("It hurts, so I think of", "", 0)


def test_text_after_the_eos_is_no_part_of_the_answer(tokenizer, ids):
    record = make_record(tokenizer, "prompt", [*ids("so</think>yes"), tokenizer.eos_token_id, *ids("and more")], 0)
    assert record["answer"] == "yes" and record["completion"] == "so</think>yes"


def test_an_eos_at_once_is_an_empty_finished_answer_of_one_token(tokenizer):
    record = make_record(tokenizer, "prompt", [tokenizer.eos_token_id, tokenizer.pad_token_id], 0)
    assert (record["completion"], record["completion_tokens"], record["finished"]) == ("", 1, True)
    assert (record["thinking_tokens"], record["answer_tokens"], record["well_formed"]) == (0, 0, False)


def test_lengths_count_generated_tokens_not_retokenized_text(tokenizer, ids):
    def letters(text):
        return [token for letter in text for token in ids(letter)]

    own = [*letters("It hurts."), *ids("</think>"), *letters("Gout.")]
    record = make_record(tokenizer, "prompt", own, 0)
    assert (record["thinking_tokens"], record["answer_tokens"]) == (len(letters("It hurts.")), len(letters("Gout.")))
    assert len(ids("It hurts.")) < len(letters("It hurts.")), "otherwise this shows nothing"
    assert make_forced(tokenizer, record, "budget", letters("Gout."))["answer_tokens"] == len(letters("Gout."))


@pytest.mark.parametrize("seed", range(20))
def test_no_length_is_above_the_tokens_that_were_generated(tokenizer, ids, seed):
    import torch

    drawn = torch.randint(0, len(tokenizer), (2, 24), generator=torch.Generator().manual_seed(seed)).tolist()
    own = [token for token in [*drawn[0][:8], *ids("</think>"), *drawn[0][8:]] if token != tokenizer.eos_token_id]
    record = make_record(tokenizer, "prompt", own, 0)
    assert record["thinking_tokens"] + record["answer_tokens"] <= record["completion_tokens"] == len(own)
    assert 0 < make_forced(tokenizer, record, "budget", drawn[1])["answer_tokens"] <= len(drawn[1])


def test_a_character_of_several_tokens_is_counted_whole(tokenizer, ids):
    record = make_record(tokenizer, "prompt", [*ids("痛い"), *ids("</think>"), *ids("痛風")], 0)
    assert (record["thinking_tokens"], record["answer_tokens"]) == (len(ids("痛い")), len(ids("痛風")))
    assert len(ids("痛風")) > 2, "otherwise this shows nothing"


# --- forced closing ------------------------------------------------------------------------------------------------


def forced(tokenizer, ids, own, closed_by, after, ended=True):
    """The record of a text that ended, and of what was written after the closing."""
    end = [tokenizer.eos_token_id]
    record = make_record(tokenizer, "prompt", ids(own) + (end if closed_by != "budget" else []), 1)
    return {**record, "forced": make_forced(tokenizer, record, closed_by, ids(after) + end * ended)}


def test_a_forced_answer_is_counted_as_an_own_one_is(tokenizer, ids):
    own = make_record(tokenizer, "prompt", [*ids("It hurts.\n</think>\nPleurisy, I think."), tokenizer.eos_token_id], 1)
    record = forced(tokenizer, ids, "It hurts.", "budget", "Pleurisy, I think.")
    fields = ("thinking", "thinking_tokens", "answer", "answer_tokens", "closed", "well_formed", "finished", "completion")
    again = with_forced_closing(record)
    assert {field: again[field] for field in fields} == {field: own[field] for field in fields}
    assert (record["answer"], record["closed"], record["finished"]) == ("", 0, False), "what it wrote itself stays"
    assert again["forced"] == record["forced"]


def test_an_answer_of_its_own_is_the_forced_one(tokenizer, ids):
    record = forced(tokenizer, ids, "It hurts.</think>Pleurisy.", "itself", "")
    assert record["forced"] == {
        "closed_by": "itself", "answer": "Pleurisy.", "answer_tokens": record["answer_tokens"], "finished": True,
    }  # fmt: skip
    assert with_forced_closing(record) is record


def test_without_forced_closing_there_is_no_such_record(tokenizer, ids):
    assert with_forced_closing(make_record(tokenizer, "prompt", ids("It hurts."), 1)) is None


def test_tags_after_a_forced_closing_are_counted(tokenizer, ids):
    again = with_forced_closing(forced(tokenizer, ids, "It hurts.", "end", "So</think>Yes"))
    assert (again["closed"], again["well_formed"], again["answer"]) == (2, False, "SoYes")
    assert again["answer_tokens"] == len(ids("SoYes")), "tags are no part of the answer"
    assert again["completion"] == f"It hurts.{CLOSING}So</think>Yes"


@pytest.mark.parametrize(
    ("own", "after", "well_formed"), [("It hurts.", "Yes.", True), ("", "Yes.", False), ("It hurts.", " ", False)]
)
def test_forced_form_needs_text_on_both_sides(tokenizer, ids, own, after, well_formed):
    again = with_forced_closing(forced(tokenizer, ids, own, "end", after))
    assert (again["closed"], again["well_formed"]) == (1, well_formed)


def test_thinking_is_cut_by_the_budget_alone(tokenizer, ids):
    cut = {
        by: forced(tokenizer, ids, "It hurts." + "</think>" * (by == "itself"), by, "Yes.") for by in ("itself", "end", "budget")
    }
    assert {by: thinking_is_cut(record) for by, record in cut.items()} == {"itself": False, "end": False, "budget": True}
    for record in cut.values():
        del record["forced"]  # as a run without forced closing has it
    assert {by: thinking_is_cut(record) for by, record in cut.items()} == {"itself": False, "end": False, "budget": True}


def test_a_shown_text_is_not_cut_within_a_word():
    words, record = "pleurisy " * 20, {"completion": "", "answer": ""}
    assert show_text(record | {"answer": words}, 50) == "[...] </think> pleurisy pleurisy pleurisy pleurisy pleurisy [...]"
    forced = {"closed_by": "budget", "answer": words}
    ends = "[...] pleurisy pleurisy\n[</think> written for it: budget] pleurisy pleurisy [...]"
    assert show_text(record | {"completion": words, "forced": forced}, 24) == ends
    assert show_text(record | {"answer": "胸膜炎" * 20}, 30) == f"[...] </think> {'胸膜炎' * 10} [...]", "a script without spaces"
    assert show_text(record | {"answer": "It hurts."}) == "[...] </think> It hurts."
