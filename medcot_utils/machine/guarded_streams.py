"""Standard output and standard error that let no secret through."""

from __future__ import annotations

import atexit
import sys
from typing import TextIO

from medcot_utils.machine.redaction import clear, secrets_at_hand
from medcot_utils.machine.secret_forms import begun_at_end


class GuardedStream:
    """A text stream without secrets, also if one is written in pieces or half to this stream and half to its `twin`.

    The end of what was written waits if it may be the beginning of a secret, whatever is flushed: until more is written, or
    the process ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._waiting = stream, ""
        self.twin: GuardedStream | None = None

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        ready = clear([self._waiting + text])[0]
        if self.twin and self.twin._waiting:
            before, after = clear([self.twin._waiting, ready])
            if (before, after) != (self.twin._waiting, ready):
                self.twin._waiting, ready = "", before + after
        kept = len(ready) - begun_at_end(ready, secrets_at_hand())
        self._waiting = ready[kept:]
        self._stream.write(ready[:kept])
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def release(self) -> None:
        """Write what waits: nothing follows it."""
        if self._waiting:
            self._stream.write(self._waiting)
        self._waiting = ""

    def __getattr__(self, name: str) -> object:
        """Return what the stream itself has."""
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Let no secret through standard output and standard error of this process from now on."""
    if any(isinstance(stream, GuardedStream) for stream in (sys.stdout, sys.stderr)):
        return
    out, err = GuardedStream(sys.stdout), GuardedStream(sys.stderr)
    out.twin, err.twin = err, out
    sys.stdout, sys.stderr = out, err
    for stream in (out, err):
        atexit.register(stream.release)
