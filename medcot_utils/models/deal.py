"""Which answers to generate, how, and which process takes the next batch: this one, or one on another GPU."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medcot_utils.config import GenerationSettings
from medcot_utils.models.records import AnswerRecord
from medcot_utils.run.clock import TimeBudgetReached

SAMPLED_TOP_K = 50  # transformers' own default, which applies to a checkpoint that sets nothing


@dataclass(frozen=True)
class Asked:
    """Hold an answer to be generated: greedy, or sampled if it has a seed."""

    id: str  # the question's
    prompt: str
    sample: int = 0  # as in `AnswerRecord`
    seed: int | None = None
    letters: str = ""  # for multiple choice: the letters to choose from

    @property
    def key(self) -> tuple[str, int, str]:
        """Return a key that is unique in a list of answers. It has the prompt, because ids of two sources may be equal."""
        return self.id, self.sample, self.prompt


@dataclass(frozen=True)
class HowToWrite:
    """Hold how the answers of one call are written; in `settings`, batch size and cache are decided."""

    settings: GenerationSettings
    answer_tokens: int | None  # as in `answer_prompts`
    letters: str = ""  # all letters that answers choose from
    # For a cache of fixed size:
    new_tokens: int = 0  # the most tokens that an answer may get
    longest: int = 0  # the tokens of the longest prompt
    prefix: tuple[int, ...] = ()  # token ids that all prompts begin with
    sampled: bool = False  # whether there are answers with a seed
    in_16_bits: bool = False  # whether 4-bit weights are unpacked once, for all steps


@dataclass(frozen=True)
class Batch:
    """Hold answers that are generated together. `missing` leaves out those that an earlier call has generated."""

    asked: list[Asked]
    missing: list[Asked]


class Deal:
    """Give the batches of one call to any process that is free, this one or another, and keep their records immediately."""

    def __init__(
        self, batches: Sequence[Batch], keep: Callable[[list[AnswerRecord]], None], require_time: Callable[[], None]
    ) -> None:
        """Make the deal of one call. Each function is called by one thread at a time.

        Args:
            keep: called with the records of a batch, or of a part of one.
            require_time: called before a batch is taken; raises TimeBudgetReached if the batch might not end in time."""
        self._waiting, self._keep, self._lock = deque(batches), keep, threading.Lock()
        self._require_time = require_time
        self.error: Exception | None = None  # why it was stopped

    def take(self) -> Batch | None:
        """Return the next batch; None if there is none, or no time for one."""
        with self._lock:
            if not self._waiting:
                return None
            try:
                self._require_time()
            except TimeBudgetReached as error:
                self._stop(error)
                return None
            return self._waiting.popleft()

    def stop(self, error: Exception) -> None:
        """Give out no further batch. Batches already taken are finished and kept; then the caller raises the first error."""
        with self._lock:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error
        self._waiting.clear()

    def keep(self, records: list[AnswerRecord]) -> None:
        """Keep the records of finished answers."""
        with self._lock:
            self._keep(records)
