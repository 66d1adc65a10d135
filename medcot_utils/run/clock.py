"""The session's clock: when it began, when it must end, and whether one more batch or step still ends in time."""

from __future__ import annotations

import math
import os
import threading
import time

from medcot_utils.errors import MedcotError

# Environment variable: seconds since the epoch, set when a session of several notebooks begins.
SESSION_STARTED = "MEDCOT_SESSION_STARTED"
_RESERVE_SECONDS = 60  # to keep what was made, and to end in peace


class TimeBudgetReached(MedcotError):
    """Work stopped before training.max_hours ended; nothing failed, what was made is kept, and the same command resumes."""


class SessionClock:
    """Say when to stop: while there is still time for what was begun, `max_hours` after the session began.

    A session begins when `medcot run` or, without it, this clock begins. Work comes in pieces, such as a training step or a batch
    of answers. Time for the next piece is judged by the longest so far."""

    def __init__(self, max_hours: float | None) -> None:
        """Args: max_hours: training.max_hours; None: the session never ends."""
        began = float(os.environ.get(SESSION_STARTED) or time.time())
        self._deadline = math.inf if max_hours is None else began + 3600 * max_hours
        self._longest, self._here = 0.0, threading.local()  # each thread has a piece of its own
        self.pieces = 0  # that this process has finished

    def begin_piece(self) -> None:
        """Note that a piece of work begins now."""
        self._here.since = time.time()

    def end_piece(self) -> None:
        """Note that the piece begun last is finished."""
        self._longest = max(self._longest, time.time() - getattr(self._here, "since", time.time()))
        self.pieces += 1

    def is_over(self) -> bool:
        """Return whether one more piece might not end in time."""
        return time.time() + 2 * self._longest + _RESERVE_SECONDS > self._deadline
