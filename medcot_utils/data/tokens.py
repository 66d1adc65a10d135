"""Make the `text` column, tokens and labels, and check what must hold before a step is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import DatasetSettings
from medcot_utils.data.contamination import Repeat
from medcot_utils.data.prompts import inference_prompt, training_text
from medcot_utils.data.rows import DataError, Row, ValidationReport
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# As much of the chain of thought must be in a row's labels.
_COT_CHARACTERS = 200


class LabelChecks(TypedDict):
    """Count the rows, and those among them with exactly one BOS, with EOS as the last label, and with the CoT in the labels."""

    rows: int
    one_bos: int
    eos_in_labels: int
    cot_in_labels: int


class TokenCounts(TypedDict):
    """Hold the mean, the maximum and the sum of the rows' tokens before any cut."""

    mean: float
    max: int
    all: int


class DataReport(TypedDict):
    """Hold what notebook 03 did to the training rows: data_report.json.

    `dropped` counts invalid rows by reason. `repeats_dropped`: rows in `repeats` were left out of training. `held_out` counts
    the rows held out, and `held_out_overlong` those that were too long for it; `list_uses` accounts for all rows.
    `prompt_is_prefix` counts the rows whose tokens begin with exactly the inference prompt's tokens."""

    rows_read: int
    dropped: dict[str, int]
    repeats: list[Repeat]
    repeats_dropped: bool
    tokens: TokenCounts
    overlong_dropped: int
    truncated: int
    prompt_is_prefix: int
    checks: LabelChecks
    held_out: NotRequired[int]  # runs of earlier versions lack it
    held_out_overlong: NotRequired[int]


def add_text_column(rows: Dataset, eos_token: str) -> Dataset:
    """Return the rows with the article's `text` column: the training template filled in, with the EOS token at its end."""

    def fill(row: Row) -> dict[str, str]:
        return {"text": training_text(row["Question"], row["Complex_CoT"], row["Response"], eos_token)}

    return rows.map(fill, desc="text column")


@dataclass(frozen=True)
class LengthReport:
    """Say what tokenizing did: tokens per row before any cut, and how many rows were dropped or truncated.

    `prompt_is_prefix` counts the rows whose tokens begin with exactly the inference prompt's tokens."""

    tokens: list[int]
    dropped: int
    truncated: int
    prompt_is_prefix: int


def tokenize_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: DatasetSettings, max_seq_length: int, newline_after_think: bool
) -> tuple[Dataset, LengthReport]:
    """Return the rows with input_ids and labels, and what tokenizing did.

    Labels are the ids themselves (`loss_on: full`), or -100 on the prompt. Overlong rows are dropped or truncated (which
    loses the answer's end and the EOS), or raise DataError with `overlong: error`. A row of which a cut would leave no more
    than the question is dropped too, and said. Raises DataError if no row is left."""
    kept, tokens, truncated, prefixes, without_reasoning = [], [], 0, 0, 0
    for index, row in enumerate(rows):
        prompt = inference_prompt(row["Question"], newline_after_think)
        encoded = tokenizer(row["text"], return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        prompt_ids = tokenizer(prompt)["input_ids"]
        tokens.append(len(ids))
        # A token that crosses the prompt's end belongs to the completion: the model has to produce it.
        labels = ids if settings.loss_on == "full" else _mask_prompt(ids, offsets, len(prompt))
        if len(ids) > max_seq_length:
            if settings.overlong == "error":
                raise DataError(
                    f"row {row['id']} has {len(ids)} tokens, more than model.max_seq_length ({max_seq_length}): raise that, "
                    f"or set dataset.overlong to drop or truncate"
                )
            if settings.overlong == "drop":
                continue
            reasoning = len(inference_prompt(row["Question"])) + min(len(row["Complex_CoT"]), _COT_CHARACTERS)
            if offsets[max_seq_length - 1][1] < reasoning:
                without_reasoning += 1
                continue
            truncated += 1
            ids, labels = ids[:max_seq_length], labels[:max_seq_length]
        prefixes += ids[: len(prompt_ids)] == prompt_ids
        kept.append({"index": index, "input_ids": list(ids), "labels": list(labels)})
    if without_reasoning:
        say(
            f"{without_reasoning} of {len(rows)} rows are dropped: cut at model.max_seq_length ({max_seq_length} tokens), they "
            f"would keep the question and less than {_COT_CHARACTERS} characters of the reasoning"
        )
    if not kept:
        raise DataError(f"every row is longer than model.max_seq_length ({max_seq_length}): raise it, or check the data")
    chosen = rows.select([item["index"] for item in kept])
    for column in ("input_ids", "labels"):
        chosen = chosen.add_column(column, [item[column] for item in kept])
    return chosen, LengthReport(tokens, len(rows) - len(kept), truncated, prefixes)


def _mask_prompt(ids: Sequence[int], offsets: Sequence[tuple[int, int]], prompt_chars: int) -> list[int]:
    # An added BOS has the offset (0, 0) and so counts as prompt.
    return [-100 if end <= prompt_chars else token for token, (_, end) in zip(ids, offsets, strict=True)]


def check_labels(rows: Dataset, tokenizer: PreTrainedTokenizerBase, truncated: int = 0) -> LabelChecks:
    """Return the counts that must hold before a step is trained; `truncated` rows may lack their EOS.

    Raises DataError for two BOS tokens, labels that are all -100, a CoT missing from the labels, or an EOS missing
    from a row that was not truncated."""
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id and tokenizer.bos_token_id is not None
    counts = LabelChecks(rows=len(rows), one_bos=0, eos_in_labels=0, cot_in_labels=0)
    for row in rows:
        ids, labels = row["input_ids"], [token for token in row["labels"] if token != -100]
        if not labels:
            raise DataError(f"row {row['id']}: every label is -100, so nothing would be learned: check dataset.loss_on")
        bos = ids[:2].count(tokenizer.bos_token_id) if adds_bos else 0
        if bos != int(adds_bos):
            raise DataError(f"row {row['id']} begins with {bos} BOS tokens, expected {int(adds_bos)}: the text already has one")
        counts["one_bos"] += bos == 1
        counts["eos_in_labels"] += labels[-1] == tokenizer.eos_token_id
        counts["cot_in_labels"] += _holds(tokenizer, labels, row["Complex_CoT"])
    if counts["cot_in_labels"] < len(rows):
        raise DataError(
            f"{len(rows) - counts['cot_in_labels']} rows lack their Complex_CoT in the labels, so the model would not learn it"
        )
    if counts["eos_in_labels"] < len(rows) - truncated:
        missing = len(rows) - counts["eos_in_labels"]
        raise DataError(f"{missing} rows do not end in the EOS token {tokenizer.eos_token!r}, though only {truncated} were cut")
    return counts


def _holds(tokenizer: PreTrainedTokenizerBase, labels: list[int], text: str) -> bool:
    """Return whether the labels hold the beginning of a text, as it is or as the tokenizer itself gives it back (in NFC)."""
    decoded = tokenizer.decode(labels)
    if text[:_COT_CHARACTERS] in decoded:
        return True
    given_back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    return given_back[:_COT_CHARACTERS].strip() in decoded


def summarize_preparation(
    validation: ValidationReport,
    lengths: LengthReport,
    checks: LabelChecks,
    repeats: list[Repeat],
    repeats_dropped: bool,
    held_out: LengthReport | None = None,
) -> DataReport:
    """Return what notebook 03 found, as one record. `lengths` is of the training rows; `held_out`, of the held-out rows."""
    tokens = lengths.tokens
    report = DataReport(
        rows_read=validation.rows_in,
        dropped=validation.dropped,
        repeats=repeats,
        repeats_dropped=repeats_dropped,
        tokens=TokenCounts(mean=sum(tokens) / len(tokens), max=max(tokens), all=sum(tokens)),
        overlong_dropped=lengths.dropped,
        truncated=lengths.truncated,
        prompt_is_prefix=lengths.prompt_is_prefix,
        checks=checks,
    )
    if held_out:
        report["held_out"], report["held_out_overlong"] = len(held_out.tokens) - held_out.dropped, held_out.dropped
    return report
