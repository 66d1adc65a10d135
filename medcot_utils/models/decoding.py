"""Decode each row of a batch by its own rules: sampled with its own random numbers, with its thinking closed if necessary.

Both rules are transformers' own hooks of one `model.generate` call, so they work for every kind of cache and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from medcot_utils.models.batches import closing_tokens
from medcot_utils.models.records import ASK_LETTER, END_OF_THINKING, ClosedBy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Hold how a token is sampled. The distribution is that of `do_sample` with the same settings."""

    temperature: float
    top_k: int
    top_p: float

    def draw(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return a token for each row of scores (rows, vocabulary), from random numbers (rows, 1) between 0 and 1.

        It is the token whose part of the cumulative distribution holds the number (inverse transform sampling). `top_k` comes
        first, so that `top_p` need not sort the whole vocabulary."""
        highest, tokens = scores.topk(min(self.top_k, scores.shape[-1]))
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)])
        shares = warpers(tokens, highest).double().softmax(dim=-1).cumsum(dim=-1)
        places = torch.searchsorted(shares, numbers * shares[:, -1:], right=True)  # rounding may keep the sum from being 1
        return tokens.gather(1, places).squeeze(1)


def draw_numbers(seed: int, steps: int) -> torch.Tensor:
    """Return the random numbers of a sampled row (steps,), one per step, between 0 and 1.

    Each row has its own generator on the CPU. So its answer depends, up to rounding, neither on the other rows nor on the
    device."""
    return torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class RowSampler(LogitsProcessor):
    """Sample the rows that have a seed, and leave the other rows greedy."""

    def __init__(self, seeds: Sequence[int | None], sampling: Sampling, steps: int, device: torch.device) -> None:
        """Args: seeds: one per row of the batch; None for a greedy row. steps: the most tokens that a row may get."""
        sampled = {row: draw_numbers(seed, steps) for row, seed in enumerate(seeds) if seed is not None}
        self._rows = torch.tensor(list(sampled), device=device)
        self._numbers = torch.stack(list(sampled.values())).to(device)  # (sampled rows, steps)
        self._sampling, self._step = sampling, 0

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these rows of the batch."""
        places = {row: place for place, row in enumerate(self._rows.tolist())}
        kept = [(new, places[old]) for new, old in enumerate(rows) if old in places]
        self._numbers = self._numbers[[place for _, place in kept]]
        self._rows = torch.tensor([new for new, _ in kept], dtype=torch.long, device=self._rows.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores (rows, vocabulary), in which each sampled row's sampled token has the highest score."""
        if len(self._rows):
            drawn = self._sampling.draw(scores[self._rows], self._numbers[:, self._step, None])
            scores[self._rows, drawn] = torch.inf
            self._step += 1
        return scores


@dataclass
class WrittenRow:
    """Hold the token ids that a row wrote by itself, and after its thinking was closed. EOS is the last one if it ended."""

    own: list[int] = field(default_factory=list)
    closed_by: ClosedBy | None = None  # as in `ForcedAnswer`; None: not known yet
    answer: list[int] = field(default_factory=list)
    letters: str = ""  # the letters to choose from
    letter: str | None = None  # the likeliest letter, if the thinking was closed for the model
    done: bool = False
    to_write: list[int] = field(default_factory=list)  # the rest of the closing, last token first


class RowRules:
    """Decide after each token of a row whether the row is done, and whether its thinking must be closed now.

    Closing is budget forcing (s1, Muennighoff et al. 2025). A row's text is decoded once, when its own text ends. With 0 answer
    tokens, nothing is written for a row, and `closed_by` says how its thinking ended. In multiple choice, `Answer:` is written
    even then, and the likeliest letter after it is read."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, answer_tokens: int | None, letters: str = ""
    ) -> None:
        """Make the rules of one call.

        Args:
            max_new_tokens: the token budget of a row's own text.
            answer_tokens: the token budget of the answer after a forced closing; None: no closing.
            letters: all letters that rows choose from, only with 0 answer tokens; "" for none. They are not read if one of them
                is more than one token."""
        self.letter_tokens = letter_tokens(tokenizer, letters)
        self._tokenizer, self._max_new_tokens, self._answer_tokens = tokenizer, max_new_tokens, answer_tokens
        self._closing = closing_tokens(tokenizer, asks_letter=bool(self.letter_tokens))

    @property
    def most_forced(self) -> int:
        """Return the most tokens that are forced on a row."""
        return len(self._closing)

    def begin_row(self, letters: str) -> WrittenRow:
        """Return a row that has written nothing. Args: letters: the letters that it chooses from."""
        return WrittenRow(letters=letters if self.letter_tokens else "")

    def keep_plain(self, row: WrittenRow, tokens: Sequence[int]) -> bool:
        """Keep tokens of a row's own text together if none of them can end it. Return whether they were kept."""
        plain = row.closed_by is None and not row.to_write and self._tokenizer.eos_token_id not in tokens
        if plain and len(row.own) + len(tokens) < self._max_new_tokens:
            row.own.extend(tokens)
            return True
        return False

    def follow(self, row: WrittenRow, token: int, score: Callable[[int], float]) -> int | None:
        """Keep the token that a row would write next. Return the token to write instead, or None to write the row's own.

        Args: score: returns the score of a token at this step."""
        ended = token == self._tokenizer.eos_token_id
        if row.to_write:
            return row.to_write.pop()
        if row.letters and row.closed_by is not None:
            row.letter = max(row.letters, key=lambda letter: score(self.letter_tokens[letter]))
            row.done = True
            return None
        if row.closed_by is not None:
            row.answer.append(token)
            row.done = ended or len(row.answer) == self._answer_tokens
            return None
        row.own.append(token)
        if not ended and len(row.own) < self._max_new_tokens:
            return None
        if self._answer_tokens is None:
            row.done = True
            return None
        text = self._tokenizer.decode(row.own[:-1] if ended else row.own, skip_special_tokens=True)
        row.closed_by = "itself" if END_OF_THINKING in text else "end" if ended else "budget"
        row.done = row.closed_by == "itself" or not (self._answer_tokens or row.letters)
        if row.done:
            return None
        row.to_write = self._closing[::-1]
        return row.to_write.pop() if ended else None


class ForcedClosing(LogitsProcessor):
    """Make the rows of one `generate` call follow `RowRules`. A step costs one argmax and one short copy."""

    def __init__(self, rules: RowRules, letters: Sequence[str]) -> None:
        """Args: letters: for each row, the letters to choose from."""
        self._rules, self.rows = rules, [rules.begin_row(its) for its in letters]
        self._batch = self.rows

    @property
    def done(self) -> list[bool]:
        """Return for each row of the batch whether it is done."""
        return [row.done for row in self._batch]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these rows of the batch. The attribute `rows` still holds all rows it began with."""
        self._batch = [self._batch[row] for row in rows]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores (rows, vocabulary), in which a forced token is the only possible token of its row."""
        tokens = scores.argmax(dim=-1).tolist()
        forced = {}
        for index, row in enumerate(self._batch):
            its = scores[index]
            instead = None if row.done else self._rules.follow(row, tokens[index], lambda token, its=its: float(its[token]))
            if instead is not None:
                forced[index] = instead
        if forced:
            scores[list(forced)] = -torch.inf
            scores[list(forced), list(forced.values())] = 0
        return scores


def letter_tokens(tokenizer: PreTrainedTokenizerBase, letters: str) -> dict[str, int]:
    """Return {letter: its token id after `Answer:`}; an empty dict if one of the letters is not a single token there."""
    start = tokenizer(ASK_LETTER, add_special_tokens=False)["input_ids"]
    found = {letter: tokenizer(f"{ASK_LETTER} {letter}", add_special_tokens=False)["input_ids"] for letter in letters}
    if all(ids[:-1] == start for ids in found.values()):
        return {letter: ids[-1] for letter, ids in found.items()}
    return {}


class StopDoneRows(StoppingCriteria):
    """Stop each row when `ForcedClosing` says that it is done."""

    def __init__(self, closing: ForcedClosing) -> None:
        """Args: closing: the processor of the same `generate` call."""
        self._closing = closing

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Return for each row whether it is done, shape (rows,)."""
        return torch.tensor(self._closing.done, device=input_ids.device)
