"""Lay out the HTML of pandas' tables: texts to the left, numbers to the right, intervals whole, wide tables in their own box.

The styles stand in each cell, because readers of notebooks that are not trusted drop style sheets. Standard library only."""

from __future__ import annotations

import html
import re

from medcot_utils.plain_text import keep_intervals

_ROW = re.compile(r"<tr\b.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<(?P<kind>t[hd])\b(?P<attributes>[^>]*)>(?P<text>.*?)</(?P=kind)>", re.DOTALL)
_SPAN = re.compile(r'colspan="(\d+)"')
_TAG = re.compile(r"<[^>]*>")
# A number, also a bound, in per cent, or with its interval.
_NUMBER = re.compile(r"((at least|at most) )?[-+]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?( ?%)?( \[[^\]]*\])?")
_NO_VALUE = {"", "-", "...", "None", "NaN", "nan", "<NA>", "not reported"}
_LONG = 24  # characters: a longer text gets a column that takes a few words a line


def lay_out(page: str) -> str:
    """Return the HTML of a table, as `DataFrame.to_html` or `Styler.to_html` writes it, with its cells aligned.

    Every column whose values are all numbers stands to the right, with its head. The texts stay as they are, but for the spaces
    within an interval, which do not end a line."""
    rows = [[cell for cell in _CELL.finditer(row) if cell["kind"] == "td"] for row in _ROW.findall(page)]
    columns = zip(*(map(_text_of, row) for row in rows if row), strict=True)
    numeric = [
        any(map(_is_number, column)) and all(_is_number(text) or text in _NO_VALUE for text in column) for column in columns
    ]
    page = _ROW.sub(lambda row: _align_row(row[0], numeric), keep_intervals(page))
    return f'<div style="max-width: 100%; overflow-x: auto">\n{page}\n</div>'


def _align_row(row: str, numeric: list[bool]) -> str:
    """Return a row with its cells aligned. `numeric`: which of the columns, counted without the index, hold numbers."""
    # pandas leaves out an index cell that the row before spans, so the columns are counted from the right.
    place = len(numeric) - sum(map(_span_of, _CELL.finditer(row)))

    def align(cell: re.Match) -> str:
        nonlocal place
        at, text = place, _text_of(cell)
        place += _span_of(cell)
        right = numeric[at] if at >= 0 and _span_of(cell) == 1 else _is_number(text)
        style = f"text-align: {'right' if right else 'left'}; vertical-align: top"
        style += "; min-width: 8em" if len(text) > _LONG and not right else ""
        return f'<{cell["kind"]}{cell["attributes"]} style="{style}">{cell["text"]}</{cell["kind"]}>'

    return _CELL.sub(align, row)


def _span_of(cell: re.Match) -> int:
    span = _SPAN.search(cell["attributes"])
    return int(span[1]) if span else 1


def _text_of(cell: re.Match) -> str:
    return html.unescape(_TAG.sub("", cell["text"])).replace("\N{NO-BREAK SPACE}", " ").strip()


def _is_number(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text))
