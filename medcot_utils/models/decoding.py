"""Decode the rows of one batch each by its own rules: sampled with its own numbers, its thinking closed for it.

Both are transformers' own hooks of one `model.generate` call, so they work for every kind of cache and engine."""

from __future__ import annotations

from collections.abc import Sequence
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


class RowSampler(LogitsProcessor):
    """Sample the rows that have a seed, and leave the others, which are greedy, as they are.

    A row takes one random number a step, from a generator of its own on the CPU: its answer depends neither on the rows that
    share its batch nor on the device (up to rounding). The distribution is that of `do_sample` with the same settings; the
    token is the one whose share of the cumulative distribution the number falls into (inverse transform sampling). The `top_k`
    tokens are taken first, so that `top_p` need not sort the whole vocabulary at every step."""

    def __init__(
        self, seeds: Sequence[int | None], temperature: float, top_k: int, top_p: float, steps: int, device: torch.device
    ) -> None:
        """Args: seeds: one per row of the batch, None for a greedy one. steps: the most tokens that a row may get."""
        sampled = [row for row, seed in enumerate(seeds) if seed is not None]
        numbers = [torch.rand(steps, dtype=torch.float64, generator=_generator(seeds[row])) for row in sampled]
        self._rows = torch.tensor(sampled, device=device)
        self._numbers = torch.stack(numbers).to(device)  # (sampled rows, steps)
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
        self._top_k, self._step = top_k, 0

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows of the batch alone."""
        places = {row: place for place, row in enumerate(self._rows.tolist())}
        kept = [(new, places[old]) for new, old in enumerate(rows) if old in places]
        self._numbers = self._numbers[[place for _, place in kept]]
        self._rows = torch.tensor([new for new, _ in kept], dtype=torch.long, device=self._rows.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores (rows, vocabulary) with the sampled token of each sampled row as its highest."""
        if not len(self._rows):
            return scores
        highest, tokens = scores[self._rows].topk(min(self._top_k, scores.shape[-1]))
        warped = self._warpers(input_ids[self._rows], highest)
        shares = warped.double().softmax(dim=-1).cumsum(dim=-1)
        numbers = self._numbers[:, self._step, None] * shares[:, -1:]  # the shares' sum may be off 1 by rounding
        self._step += 1
        chosen = tokens.gather(1, torch.searchsorted(shares, numbers, right=True))
        scores[self._rows, chosen.squeeze(1)] = torch.inf
        return scores


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(seed or 0)


@dataclass
class WrittenRow:
    """Hold what a row wrote by itself, and after the closing of its thinking. Token ids; EOS is the last one if it ended."""

    own: list[int] = field(default_factory=list)
    closed_by: ClosedBy | None = None  # as in `ForcedAnswer`; None: not known yet
    answer: list[int] = field(default_factory=list)
    letters: str = ""  # to choose from
    letter: str | None = None  # the likeliest of them, if the thinking was closed for it
    done: bool = False
    to_write: list[int] = field(default_factory=list)  # what is left of the closing, last token first


class ForcedClosing(LogitsProcessor):
    """Close the thinking of rows that did not: at their budget, or in the place of an EOS. Then let them write an answer.

    This is budget forcing (s1, Muennighoff et al. 2025). The rows' text is kept on the host and decoded once, where a row's own
    text ends: a step costs one argmax and one short copy. Without answer tokens nothing is written for a row, and `closed_by`
    tells how its thinking ended; or, of a multiple choice, `Answer:` is, and the likeliest letter after it is read."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        max_new_tokens: int,
        answer_tokens: int,
        letters: Sequence[str] | None = None,
    ) -> None:
        """Make the processor of one batch.

        Args:
            max_new_tokens: the budget of a row's own text.
            answer_tokens: that of the answer after a forced closing.
            letters: of each row, those to choose from, "" for no choice. Without answer tokens only. They are not read if one
                of them is more tokens than one."""
        self._letter_tokens = letter_tokens(tokenizer, "".join(letters or ()))
        self.rows = [WrittenRow(letters=letters[row] if self._letter_tokens else "") for row in range(rows)]
        self._batch = self.rows
        self._tokenizer, self._max_new_tokens, self._answer_tokens = tokenizer, max_new_tokens, answer_tokens
        self._closing = closing_tokens(tokenizer, asks_letter=bool(self._letter_tokens))

    @property
    def done(self) -> list[bool]:
        """Return for each row of the batch whether it is done."""
        return [row.done for row in self._batch]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows of the batch alone. `rows` still holds all that it began with."""
        self._batch = [self._batch[row] for row in rows]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores (rows, vocabulary), in which a forced token is the only possible one of its row."""
        tokens = scores.argmax(dim=-1).tolist()
        forced = {}
        for index, row in enumerate(self._batch):
            instead = None if row.done else self._follow(row, tokens[index], scores[index])
            if instead is not None:
                forced[index] = instead
        if forced:
            scores[list(forced)] = -torch.inf
            scores[list(forced), list(forced.values())] = 0
        return scores

    def _follow(self, row: WrittenRow, token: int, scores: torch.FloatTensor) -> int | None:
        """Keep the token that a row would write next. Return the one that it is to write instead, None if its own."""
        ended = token == self._tokenizer.eos_token_id
        if row.to_write:
            return row.to_write.pop()
        if row.letters and row.closed_by is not None:
            row.letter = max(row.letters, key=lambda letter: float(scores[self._letter_tokens[letter]]))
            row.done = True
            return None
        if row.closed_by is not None:
            row.answer.append(token)
            row.done = ended or len(row.answer) == self._answer_tokens
            return None
        row.own.append(token)
        if not ended and len(row.own) < self._max_new_tokens:
            return None
        text = self._tokenizer.decode(row.own[:-1] if ended else row.own, skip_special_tokens=True)
        row.closed_by = "itself" if END_OF_THINKING in text else "end" if ended else "budget"
        row.done = row.closed_by == "itself" or not (self._answer_tokens or row.letters)
        if row.done:
            return None
        row.to_write = self._closing[::-1]
        return row.to_write.pop() if ended else None


def letter_tokens(tokenizer: PreTrainedTokenizerBase, letters: str) -> dict[str, int]:
    """Return the token of each letter as it follows `Answer:`; nothing if one of them is not a single token there."""
    start = tokenizer(ASK_LETTER, add_special_tokens=False)["input_ids"]
    found = {letter: tokenizer(f"{ASK_LETTER} {letter}", add_special_tokens=False)["input_ids"] for letter in letters}
    if all(ids[:-1] == start for ids in found.values()):
        return {letter: ids[-1] for letter, ids in found.items()}
    return {}


class StopDoneRows(StoppingCriteria):
    """Stop each row where `ForcedClosing` says that it is done."""

    def __init__(self, closing: ForcedClosing) -> None:
        """Args: closing: the processor of the same `generate` call."""
        self._closing = closing

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Return for each row whether it is done, shape (rows,)."""
        return torch.tensor(self._closing.done, device=input_ids.device)
