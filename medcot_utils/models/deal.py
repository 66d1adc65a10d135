"""The questions to answer, how, and who takes the next batch: this process, or one on another GPU."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medcot_utils.config import GenerationSettings
from medcot_utils.models.records import AnswerRecord
from medcot_utils.run.clock import TimeBudgetReached

SAMPLED_TOP_K = 50  # transformers' own default: what a checkpoint that sets nothing samples from


@dataclass(frozen=True)
class Asked:
    """An answer to be made: greedy, or sampled if it has a seed."""

    id: str  # the question's
    prompt: str
    sample: int = 0  # as in `AnswerRecord`
    seed: int | None = None
    letters: str = ""  # of a multiple choice: those to choose from

    @property
    def key(self) -> tuple[str, int, str]:
        """Return what tells an answer from the others of its list: with the prompt, for ids of two sources may be equal."""
        return self.id, self.sample, self.prompt


@dataclass(frozen=True)
class HowToWrite:
    """Hold how the answers of one call are written; `settings` has batch size and cache decided."""

    settings: GenerationSettings
    answer_tokens: int | None  # as in `answer_prompts`
    letters: str = ""  # all that answers choose from
    # Of a cache of fixed size:
    new_tokens: int = 0  # the most that an answer may get
    longest: int = 0  # tokens of the longest prompt
    prefix: tuple[int, ...] = ()  # token ids that all prompts begin with
    sampled: bool = False  # whether there are answers with a seed
    in_16_bits: bool = False  # whether 4-bit weights are unpacked once, for all steps


@dataclass(frozen=True)
class Batch:
    """Answers that are asked together; those of an earlier call, which are kept already, among them."""

    asked: list[Asked]
    missing: list[Asked]


class Deal:
    """Deal the batches of one call out to whoever is free, this process or another one, and keep their records at once."""

    def __init__(
        self, batches: Sequence[Batch], keep: Callable[[list[AnswerRecord]], None], require_time: Callable[[], None]
    ) -> None:
        """Make the deal of one call. Neither function is called twice at a time.

        Args:
            keep: takes the records of a batch, or of a part of one.
            require_time: called before a batch is taken; raises TimeBudgetReached if it might not end in time."""
        self._waiting, self._keep, self._lock = deque(batches), keep, threading.Lock()
        self._require_time = require_time
        self.error: Exception | None = None  # why it was stopped

    def take(self) -> Batch | None:
        """Return the next batch, None if there is none or no time is left for one."""
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
        """Deal out no further batch. Those that were taken are finished and kept; then the first such error is raised."""
        with self._lock:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error
        self._waiting.clear()

    def keep(self, records: list[AnswerRecord]) -> None:
        """Keep the records of answers that are made."""
        with self._lock:
            self._keep(records)
