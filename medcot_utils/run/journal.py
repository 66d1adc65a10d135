"""Records kept one batch at a time while an artifact is made, so that a kill costs what was in the making."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.paths import display_path
from medcot_utils.run.clock import SessionClock, TimeBudgetReached
from medcot_utils.run.files import write_atomic
from medcot_utils.run.shapes import BATCH, read_records


class Journal:
    """Keep the records of an unfinished artifact in a .jsonl file of their own.

    The first line holds what they were made from; a file made from something else counts as empty and is started again. Each
    further line is the list of records of one `add`, so that a batch is kept whole or not at all: a last line that a kill cut
    off counts as not there."""

    def __init__(self, path: Path, made_from: str, clock: SessionClock | None = None) -> None:
        """Args: made_from: the artifact's fingerprint, see `Run.fingerprint`; clock: None: the session never ends."""
        self.path, self._head = path, json.dumps({"made_from": made_from})
        self._clock = clock or SessionClock(None)

    def require_time(self, what: str, made: int, wanted: int) -> None:
        """Note that a batch begins, or raise TimeBudgetReached if it might not end in the session's time.

        At least one batch is made by each process, so that every session gets further."""
        if self._clock.pieces and self._clock.is_over():
            raise TimeBudgetReached(
                f"{what}: stopped after {made} of {wanted}, before training.max_hours ended; they are kept, and the same "
                f"command or notebook resumes there"
            )
        self._clock.begin_piece()

    def read(self) -> list[dict[str, Any]]:
        """Return the records kept so far, in the order in which they were added. Raises RunError for lines that hold others than
        answers: the run may be somebody else's."""
        if not self.path.exists():
            return []
        head, *lines = self.path.read_bytes().split(b"\n")
        if head.decode(errors="replace") != self._head:
            return []
        # Behind the last line break is nothing, or a line cut off.
        source = f"{display_path(self.path.parent)}/{self.path.name}"
        return [record for batch in read_records(b"\n".join(lines[:-1]), source, BATCH, 2) for record in batch]

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of a batch; they are on the disk when this returns. Raises DiskError on a full disk."""
        if not self.read():
            write_atomic(self.path, self._head + "\n")
        with full_disk_told(self.path.name, self.path.parent), self.path.open("r+b") as stream:
            whole = stream.read().rfind(b"\n") + 1
            stream.seek(whole)
            stream.truncate()
            stream.write(json.dumps(list(records)).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._clock.end_piece()
