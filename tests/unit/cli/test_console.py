"""The terminal of every command: a text is a text, in a line and in a table."""

from __future__ import annotations

import io

import pytest
from planted_texts import PAYLOADS, shown
from rich.table import Table

from medcot_utils.cli.console import PlainConsole


@pytest.mark.parametrize("name", PAYLOADS)
def test_lines_and_tables_show_a_text_as_it_is(name):
    text, drawn = PAYLOADS[name][0], io.StringIO()
    terminal = PlainConsole(file=drawn, width=400)
    table = Table(text, title=text)
    table.add_row(text)
    terminal.print(table)
    terminal.print(text, soft_wrap=True)
    assert drawn.getvalue().count(shown(name)) == 4
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(drawn.getvalue())
