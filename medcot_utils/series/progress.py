"""The state of a running notebook, shown live in a terminal, and logged every few minutes elsewhere."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from medcot_utils.machine.durations import TimeEstimate, describe_end
from medcot_utils.machine.redaction import clear_outputs, redact

_EVERY_SECONDS, _LIVE_SECONDS = 300, 2
_BAR = re.compile(r"(?<=%)\|[^|]*\|")  # tqdm's bar, between the percentage and the count


class Watch:
    """Keep track of the running cell of a notebook, and of its outputs so far."""

    def __init__(self, notebook: str, estimate: TimeEstimate | None) -> None:
        self._notebook, self._estimate, self._began = notebook, estimate, time.time()
        self._cells: Sequence[Any] = ()
        self._index = 0

    def begin_cell(self, cells: Sequence[Any], index: int) -> None:
        """Record that a cell of the notebook begins."""
        self._cells, self._index = cells, index

    def describe(self) -> str:
        """Return one line: the section, the last line that the cell has shown, and when the notebook is expected to end."""
        heading, shown = find_heading(self._cells, self._index), read_last_line(self._cells, self._index)
        end = describe_end(self._estimate, self._began) if self._estimate else ""
        return redact(f"{self._notebook}: {', '.join(filter(None, (heading, shown, end))) or 'running'}")


def find_heading(cells: Sequence[Any], index: int) -> str:
    """Return the heading of the section that a cell is in, as in `2.7 The answers`; "" before the first section."""
    for cell in reversed(cells[: index + 1]):
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            return cell.source.splitlines()[0].removeprefix("## ").strip()
    return ""


def read_last_line(cells: Sequence[Any], index: int) -> str:
    """Return the last line of text that a cell has written so far, without secrets; "" if there is none.

    For a progress bar, the line is its last state, in figures."""
    outputs = clear_outputs(cells[index].get("outputs", []), is_running=True) if index < len(cells) else []
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return " ".join(_BAR.sub(" ", lines[-1]).split()) if lines else ""


@contextmanager
def watching(
    notebook: str, estimate: TimeEstimate | None, say: Callable[[str], None], show: Callable[[str], None] | None = None
) -> Iterator[Watch]:
    """Say every five minutes, from a separate thread, what the notebook is doing, until the block ends.

    With `show`, which replaces the line that it showed before, do so every two seconds instead."""
    watch, ended = Watch(notebook, estimate), threading.Event()
    tell, seconds = (say, _EVERY_SECONDS) if show is None else (show, _LIVE_SECONDS)

    def speak() -> None:
        while not ended.wait(seconds):
            tell(watch.describe())

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield watch
    finally:
        ended.set()
        speaker.join()
