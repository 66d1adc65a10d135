"""Processes that this one starts: ended with it, and why one of them ended."""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

from medcot_utils.machine.redaction import redact

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent() -> None:
    """Have the kernel end this process once the thread that started it is gone. On Linux; elsewhere it does nothing.

    Processes that outlived a killed notebook would hold its GPUs, and write what the next call writes too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def describe_exit(exit_code: int) -> str:
    """Return how a process ended, from its exit code: negative if a signal killed it."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    why = ", as a machine out of main memory does" if -exit_code == signal.SIGKILL else ""
    return f"killed by signal {-exit_code}{why}"


def read_last_line(path: Path) -> str:
    """Return the end of the last line of a log without secrets (at most 300 characters); empty if there is none."""
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    return redact(text.rpartition("\n")[2])[-300:]  # in this order: half a secret would not be found
