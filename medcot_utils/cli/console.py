"""The terminal that every command writes to."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from medcot_utils.plain_text import one_line, show_controls


class PlainConsole(Console):
    """Show every text unchanged, without markup and with control characters written out, also in tables."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as rich shows it, in a line or in the cell or title of a table."""
        return super().render_str(show_controls(text), **options)


console = PlainConsole()


def say(*lines: str) -> None:
    """Print each line as one line, whatever text it quotes, on a terminal and in a log."""
    for line in lines:
        console.print(one_line(line), highlight=False, soft_wrap=True)
