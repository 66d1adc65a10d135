"""The record of one answer: as the model wrote it, and with forced closing."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NotRequired, cast

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.data.prompts import TAG, parse_completion
from medcot_utils.plain_text import show_controls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot_utils.models.deal import Asked
    from medcot_utils.models.decoding import WrittenRow

END_OF_THINKING = "</think>"
# This text closes the thinking for the model, as in the training text (`prompts.TRAINING_TEMPLATE`).
CLOSING = f"\n{END_OF_THINKING}\n"
# The rest of a word in which a text was cut, if the text has spaces.
_WORD_BEFORE, _WORD_AFTER = re.compile(r"^\S{1,30}\s+"), re.compile(r"\s+\S{1,30}$")
ASK_LETTER = "Answer:"  # the text before the letter in multiple choice, as its prompt asks for it
ClosedBy = Literal["itself", "budget", "end"]


class ForcedAnswer(TypedDict):
    """Hold the answer with forced closing (budget forcing; s1, Muennighoff et al. 2025).

    closed_by: `itself` if the model wrote `</think>`; then the answer is its own. `budget` if its thinking was cut at
    max_new_tokens, and `end` if its text ended without the tag. In both cases the tag was written for it, and then it wrote up
    to evaluation.answer_tokens."""

    closed_by: ClosedBy
    answer: str  # stripped; tags that the model wrote after the forced one stay in it
    answer_tokens: int  # the tokens that the model generated for the answer, as in `AnswerRecord`
    finished: bool  # ended by EOS


class AnswerRecord(TypedDict):
    """Hold one model's answer to one question: a line of base_answers.jsonl, tuned_answers.jsonl, or merged_answers.jsonl."""

    id: NotRequired[str]  # the question's; absent if the question is not one of a run
    sample: NotRequired[int]  # 0: greedy; k: the k-th sample. Absent if `id` is
    prompt: str
    completion: str  # the whole text that was written, without special tokens
    thinking: str  # the text before the first `</think>`, stripped; the whole text if the tag was never closed
    answer: str  # the text after the tag, stripped
    completion_tokens: int  # including EOS
    thinking_tokens: int  # the tokens that the model generated for this text: without tags, EOS, and space around it
    answer_tokens: int  # likewise. Runs of earlier versions counted the text tokenized again, which can come to more
    closed: int  # how many `</think>` tags were written
    well_formed: bool  # closed exactly once, with text on both sides
    finished: bool  # ended by EOS, not cut off at max_new_tokens
    seconds: float  # its share of the time of the answers that were generated at once
    forced: NotRequired[ForcedAnswer]  # with forced closing; absent if evaluation.answer_tokens is not set, as in earlier runs
    letter: NotRequired[str]  # in multiple choice, if thinking was closed for the model: the likeliest letter after `ASK_LETTER`


AnswerBatch = list[AnswerRecord]  # a line of a journal


def by_sample(records: Sequence[AnswerRecord]) -> list[list[AnswerRecord]]:
    """Split records of `answer_questions` into one list per sample; the first list is greedy."""
    samples: dict[int, list[AnswerRecord]] = {}
    for record in records:
        samples.setdefault(record["sample"], []).append(record)
    return [samples[sample] for sample in sorted(samples)]


def with_forced_closing(record: AnswerRecord) -> AnswerRecord | None:
    """Return a record as it reads with forced closing: the same thinking, then the forced answer. Return None without one.

    `closed` counts the forced tag and any tags that the model wrote after it. Thinking that was cut keeps its length, which is
    then a lower bound (`thinking_is_cut`)."""
    if "forced" not in record:
        return None
    forced = record["forced"]
    if forced["closed_by"] == "itself":
        return record
    completion = record["completion"] + CLOSING + forced["answer"]
    parsed = parse_completion(completion)
    changed = {
        "completion": completion,
        "answer": parsed.answer,
        "answer_tokens": forced["answer_tokens"],
        "closed": parsed.closed,
        "well_formed": parsed.well_formed,
        "finished": forced["finished"],
    }
    return cast("AnswerRecord", {**record, **changed})


def show_text(record: AnswerRecord, characters: int = 400) -> str:
    """Return what a reader should see of an answer, at most `characters` of each part.

    It is the answer. If the model gave none by itself, it is the end of what the model wrote, then the forced answer with a
    label."""
    if record["answer"]:
        return show_controls(f"[...] </think> {_begin(record['answer'], characters)}")
    written = record["completion"].strip()
    shown = written if len(written) <= characters else f"[...] {_WORD_BEFORE.sub('', written[-characters:])}"
    if (forced := record.get("forced")) and forced["closed_by"] != "itself":
        shown += f"\n[</think> written for it: {forced['closed_by']}] {_begin(forced['answer'], characters)}"
    return show_controls(shown)


def _begin(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{_WORD_AFTER.sub('', text[:characters])} [...]"


def thinking_is_cut(record: AnswerRecord) -> bool:
    """Return whether the token budget ended the thinking, so that its length is a lower bound."""
    if "forced" in record:
        return record["forced"]["closed_by"] == "budget"
    return record["closed"] == 0 and not record["finished"]


def record_answer(tokenizer: PreTrainedTokenizerBase, asked: Asked, written: WrittenRow, seconds: float) -> AnswerRecord:
    """Return the whole record of an answer, from what its row wrote. `seconds` is its share of the time."""
    record = make_record(tokenizer, asked.prompt, written.own, seconds)
    if written.closed_by is not None:
        record["forced"] = make_forced(tokenizer, record, written.closed_by, written.answer)
    if written.letter is not None:
        record["letter"] = written.letter
    return {"id": asked.id, "sample": asked.sample, **record}


def make_record(tokenizer: PreTrainedTokenizerBase, prompt: str, token_ids: list[int], seconds: float) -> AnswerRecord:
    """Return the record of one completion, without id and sample, from its token ids, which may have padding after EOS."""
    own, finished = _until_eos(tokenizer, token_ids)
    completion = tokenizer.decode(own, skip_special_tokens=True)
    parsed = parse_completion(completion)
    closed_at = completion.find(END_OF_THINKING) if parsed.closed else len(completion)
    return {
        "prompt": prompt,
        "completion": completion,
        "thinking": parsed.thinking,
        "answer": parsed.answer,
        "completion_tokens": len(own) + finished,
        "thinking_tokens": _count(tokenizer, own, completion, 0, closed_at),
        "answer_tokens": _count(tokenizer, own, completion, closed_at, len(completion)),
        "closed": parsed.closed,
        "well_formed": parsed.well_formed,
        "finished": finished,
        "seconds": round(seconds, 3),
    }


def make_forced(
    tokenizer: PreTrainedTokenizerBase, record: AnswerRecord, closed_by: ClosedBy, token_ids: list[int]
) -> ForcedAnswer:
    """Return the answer with forced closing for a record, from the token ids written after the forced tag.

    If the model closed its thinking itself, it is the record's own answer, and `token_ids` are ignored."""
    if closed_by == "itself":
        own = {"answer": record["answer"], "answer_tokens": record["answer_tokens"], "finished": record["finished"]}
        return cast("ForcedAnswer", {"closed_by": closed_by, **own})
    ids, finished = _until_eos(tokenizer, token_ids)
    written = tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "closed_by": closed_by,
        "answer": written.strip(),
        "answer_tokens": _count(tokenizer, ids, written, 0, len(written)),
        "finished": finished,
    }


def _until_eos(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> tuple[list[int], bool]:
    """Return the token ids before EOS, and whether there is an EOS."""
    if tokenizer.eos_token_id not in token_ids:
        return token_ids, False
    return token_ids[: token_ids.index(tokenizer.eos_token_id)], True


def _count(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str, begin: int, end: int) -> int:
    """Return how many of the token ids wrote `text[begin:end]`, without tags and the space around them.

    `text` is what the ids decode to. To tokenize it again would not do: a model need not choose the tokens that its tokenizer
    would, and the count could be above the budget."""

    def written(count: int) -> str:
        return tokenizer.decode(token_ids[:count], skip_special_tokens=True)

    def complete(count: int) -> int:
        return len(written(count).rstrip("\ufffd"))  # bytes that do not yet make a character

    counts, tokens, at = range(len(token_ids) + 1), 0, begin
    for piece in TAG.split(text[begin:end]):
        at = text.index(piece, at)
        if piece.strip():
            first = at + len(piece) - len(piece.lstrip())
            before = bisect_right(counts, first, key=lambda count: len(written(count))) - 1
            tokens += min(bisect_left(counts, at + len(piece.rstrip()), key=complete), len(token_ids)) - before
        at += len(piece)
    return tokens
