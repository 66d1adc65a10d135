"""Write answers in the slots of one cache: a finished row makes room for a waiting one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel

from medcot_utils.models.batches import count_read_at_once, split
from medcot_utils.models.deal import SAMPLED_TOP_K, Asked, Batch, HowToWrite
from medcot_utils.models.decoding import RowRules, Sampling, WrittenRow, draw_numbers
from medcot_utils.models.records import AnswerRecord, record_answer
from medcot_utils.models.slots import Slots
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURN = 16  # steps between reads of the written tokens; each read waits for the GPU


@dataclass
class _Row:
    """Hold an answer that is being written."""

    asked: Asked
    written: WrittenRow
    prompt_tokens: int
    made: int = 0  # final tokens
    forced: int = 0  # how many of the next tokens are forced
    seconds: float = 0.0


@dataclass(frozen=True)
class _Move:
    """Hold the place in its slot from which a row continues, the token to feed there, and the tokens forced after that one."""

    token: int
    place: int
    forced: Sequence[int] = ()


class SlotWriter:
    """Write answers with one model, and fewer at once if memory runs out.

    Through rounding, a row's text depends on the number of slots and on the prompts that are read with it. It depends on no
    other row."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: HowToWrite) -> None:
        """Args: model: what `generation.convert_to_write` returns; see `slots.fits_slots`."""
        self._model, self._tokenizer, self.how = model, tokenizer, how
        self._rules = RowRules(tokenizer, how.settings.max_new_tokens, how.answer_tokens, how.letters)
        self._rows, self._board = how.settings.batch_size, None
        self._active: dict[int, _Row] = {}

    def write(self, take: Callable[[], Batch | None]) -> Iterator[list[AnswerRecord]]:
        """Yield records as answers are finished. `take` returns the next batch, or None if there is none."""
        again: deque[Batch] = deque()
        while True:
            try:
                yield from self._write(lambda: self._take_part(take, again))
                return
            except RuntimeError as error:
                if self._rows == 1 or not should_reduce_batch_size(error):
                    raise
            # This is outside the except block, whose traceback would keep the slots alive.
            self._board, self._rows = None, self._rows // 2
            torch.cuda.empty_cache()
            say(f"out of memory: {self._rows} answers at once from here on")
            unfinished = [row.asked for row in self._active.values()]
            if unfinished:
                again.appendleft(Batch(unfinished, unfinished))
            self._active = {}

    def _take_part(self, take: Callable[[], Batch | None], again: deque[Batch]) -> Batch | None:
        """Return the part of the next batch that is read at once; the rest waits in `again`."""
        batch = again.popleft() if again else take()
        if batch is None:
            return None
        part, *rest = split(batch.asked, count_read_at_once(self._rows))
        if rest:
            asked = [one for others in rest for one in others]
            again.appendleft(Batch(asked, [one for one in asked if one in batch.missing]))
        return Batch(part, [one for one in part if one in batch.missing])

    def _write(self, take: Callable[[], Batch | None]) -> Iterator[list[AnswerRecord]]:
        board = self._board = self._board or _Board(self._model, self.how, self._rules, self._rows)
        with board.slots.installed():
            board.prepare()
            done: list[_Row] = []
            while True:
                began = time.perf_counter()
                self._seat(board, take)
                if self._active:
                    board.begin_turn()
                if done:  # a GPU writes the next turn meanwhile
                    yield [record_answer(self._tokenizer, row.asked, row.written, row.seconds) for row in done]
                if not self._active:
                    return
                done = self._end_turn(board, began)

    def _end_turn(self, board: _Board, began: float) -> list[_Row]:
        """Keep what the rows have written. Return the finished rows, which leave their slots."""
        tokens, scores = board.end_turn()
        for row in self._active.values():
            row.seconds += (time.perf_counter() - began) / len(self._active)
        moves = {slot: self._follow(row, tokens[slot], scores[slot]) for slot, row in self._active.items()}
        done = [slot for slot, row in self._active.items() if row.written.done]
        board.move({slot: move for slot, move in moves.items() if move} | dict.fromkeys(done, board.idle))
        return [self._active.pop(slot) for slot in done]

    def _seat(self, board: _Board, take: Callable[[], Batch | None]) -> None:
        """Read waiting prompts into free slots, a batch at a time."""
        while True:
            free = [slot for slot in range(self._rows) if slot not in self._active]
            if len(free) < count_read_at_once(self._rows) or (batch := take()) is None:
                return
            prompts = [self._tokenizer(asked.prompt)["input_ids"] for asked in batch.asked]
            places = [place for place, asked in enumerate(batch.asked) if asked in batch.missing]
            slots = dict(zip(places, free, strict=False))
            for place, slot in slots.items():
                asked = batch.asked[place]
                self._active[slot] = _Row(asked, self._rules.begin_row(asked.letters), len(prompts[place]))
            board.read(prompts, slots, [batch.asked[place].seed for place in slots])

    def _follow(self, row: _Row, tokens: Sequence[int], scores: Sequence[dict[int, float]]) -> _Move | None:
        """Keep what a row has written in a turn. Return a move if the row must continue from another token or place."""
        if not row.forced and self._rules.keep_plain(row.written, tokens):
            row.made += len(tokens)
            return None
        for token, its in zip(tokens, scores, strict=True):
            row.made += 1
            if row.forced:
                row.forced -= 1
                continue
            instead = self._rules.follow(row.written, token, its.__getitem__)
            if row.written.done:
                return None
            if instead is not None or row.written.to_write:
                forced, row.written.to_write = row.written.to_write[::-1], []
                row.forced = len(forced)
                return _Move(token if instead is None else instead, row.prompt_tokens + row.made - 1, forced)
        return None


class _Board:
    """Hold the tensors that a step reads and writes on the model's device. On a GPU, a step is one recorded CUDA graph."""

    def __init__(self, model: PreTrainedModel, how: HowToWrite, rules: RowRules, rows: int) -> None:
        device = model.device
        self._how, self._letters = how, list(rules.letter_tokens.values())
        self.idle = _Move(0, len(how.prefix))
        with torch.inference_mode():
            self.slots = Slots(model, rows, how.longest + how.new_tokens + _TURN, how.prefix)
            self._graph: torch.cuda.CUDAGraph | None = None
            self._written = torch.zeros(rows, _TURN, dtype=torch.long, device=device)
            self._column = torch.zeros(1, dtype=torch.long, device=device)
            self._letter_ids = torch.tensor(self._letters, dtype=torch.long, device=device)
            self._scores = torch.zeros(rows, _TURN, len(self._letters), device=device)
            self._forced = torch.zeros(rows, rules.most_forced + 1, dtype=torch.long, device=device)
            self._next, self._end, self._first = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
            steps = how.new_tokens if how.sampled else 0
            self._numbers = torch.zeros(rows, steps, dtype=torch.float64, device=device)
            self._is_sampled = torch.zeros(rows, dtype=torch.bool, device=device)
        settings = how.settings
        self._sampling = Sampling(settings.temperature, SAMPLED_TOP_K, settings.top_p)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Read the common beginning of all prompts. On a GPU, also compile and record a step, the first time."""
        self.slots.places.fill_(self.idle.place)
        self.slots.read_prefix()
        if self.slots.tokens.device.type != "cuda" or self._graph is not None:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], slots: dict[int, int], seeds: Sequence[int | None]) -> None:
        """Read prompts, and let rows begin with them.

        Args:
            prompts: the token ids of all prompts that are read together.
            slots: {index of a prompt: the slot in which its row begins}.
            seeds: the seed of each such row; None for a greedy row."""
        begin, longest = len(self._how.prefix), max(map(len, prompts)) - 1
        size = count_read_at_once(self.slots.rows)
        padded = [list(prompts[min(row, len(prompts) - 1)][begin:-1]) for row in range(size)]
        padded = [ids + [0] * (longest - begin - len(ids)) for ids in padded]
        device = self.slots.tokens.device
        chosen, free = (torch.tensor(list(numbers), device=device) for numbers in (slots, slots.values()))
        if longest > begin:  # the first step feeds the last token of each prompt
            self.slots.read(torch.tensor(padded, device=device), free, chosen)
        self.move({slot: _Move(prompts[place][-1], len(prompts[place]) - 1) for place, slot in slots.items()})
        self._first[free] = torch.tensor([len(prompts[place]) - 1 for place in slots], device=device)
        if self._how.sampled:
            self._is_sampled[free] = torch.tensor([seed is not None for seed in seeds], device=device)
            numbers = [draw_numbers(seed or 0, self._how.new_tokens) for seed in seeds]
            self._numbers[free] = torch.stack(numbers).to(device)

    @torch.inference_mode()
    def move(self, moves: dict[int, _Move]) -> None:
        """Make the rows in these slots continue from other tokens or places."""
        if not moves:
            return
        device, width = self.slots.tokens.device, self._forced.shape[1]
        slots = torch.tensor(list(moves), device=device)
        for held, values in {
            self.slots.tokens: [move.token for move in moves.values()],
            self.slots.places: [move.place for move in moves.values()],
            self._forced: [[*move.forced, *[0] * (width - len(move.forced))] for move in moves.values()],
            self._next: [0] * len(moves),
            self._end: [len(move.forced) for move in moves.values()],
        }.items():
            held[slots] = torch.tensor(values, device=device)

    @torch.inference_mode()
    def begin_turn(self) -> None:
        """Let all slots write for a turn. A GPU does so while this process continues."""
        self._column.zero_()
        for _ in range(_TURN):
            if self._graph:
                self._graph.replay()
            else:
                self._step()

    def end_turn(self) -> tuple[list[list[int]], list[list[dict[int, float]]]]:
        """Return each slot's tokens of the turn, and for each step the scores of the letters' tokens."""
        tokens = self._written.tolist()
        if not self._letters:
            return tokens, [[{}] * _TURN] * len(tokens)
        return tokens, [[dict(zip(self._letters, step, strict=True)) for step in row] for row in self._scores.tolist()]

    def _step(self) -> None:
        scores = self.slots.step().float()
        tokens = scores.argmax(dim=-1)
        if self._how.sampled:
            step = (self.slots.places - self._first).clamp(0, self._numbers.shape[1] - 1)
            drawn = self._sampling.draw(scores, self._numbers.gather(1, step[:, None]))
            tokens = torch.where(self._is_sampled, drawn, tokens)
        if self._letters:
            self._scores.index_copy_(1, self._column, scores[:, None, self._letter_ids])
        forced = self._forced.gather(1, self._next.minimum(self._end)[:, None]).squeeze(1)
        tokens = torch.where(self._next < self._end, forced, tokens)
        self._next.add_(1)
        self._written.index_copy_(1, self._column, tokens[:, None])
        self._column.add_(1).remainder_(_TURN)
        self.slots.tokens.copy_(tokens)
        self.slots.places.add_(1).clamp_(max=self.slots.capacity - 1)
