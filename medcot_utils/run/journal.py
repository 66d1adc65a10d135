"""Records kept one batch at a time while an artifact is made, so that a kill costs what was in the making."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medcot_utils.machine.disk import full_disk_told
from medcot_utils.run.files import write_atomic


class Journal:
    """Keep the records of an unfinished artifact in a .jsonl file of their own.

    The first line holds what they were made from. A file made from something else counts as empty and is begun anew, and so
    is the last line of a file that a kill cut off."""

    def __init__(self, path: Path, made_from: str) -> None:
        """Args: made_from: the artifact's fingerprint, see `Run.fingerprint`."""
        self.path, self._head = path, json.dumps({"made_from": made_from})

    def read(self) -> list[dict[str, Any]]:
        """Return the records kept so far, in the order in which they were added."""
        if not self.path.exists():
            return []
        head, *lines = self.path.read_bytes().split(b"\n")
        if head.decode(errors="replace") != self._head:
            return []
        return [json.loads(line) for line in lines[:-1]]  # behind the last line break is nothing, or a line cut off

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records; they are on the disk when this returns. Raises DiskError on a full disk."""
        kept = self.read()
        if not kept:
            write_atomic(self.path, self._head + "\n")
        with full_disk_told(self.path.name, self.path.parent), self.path.open("r+b") as stream:
            whole = stream.read().rfind(b"\n") + 1
            stream.seek(whole)
            stream.truncate()
            stream.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            stream.flush()
            os.fsync(stream.fileno())
