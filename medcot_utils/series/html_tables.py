"""Lay out the HTML of pandas' tables: texts left, numbers right, no line break in intervals, wide tables in a box that scrolls.

The styles are in each cell, because viewers drop the style sheets of notebooks that are not trusted. Standard library only."""

from __future__ import annotations

import html
import re

from medcot_utils.plain_text import keep_intervals

_ROW = re.compile(r"<tr\b.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<(?P<kind>t[hd])\b(?P<attributes>[^>]*)>(?P<text>.*?)</(?P=kind)>", re.DOTALL)
_SPAN = re.compile(r'colspan="(\d+)"')
_TAG = re.compile(r"<[^>]*>")
_HEAD = re.compile(r"<thead>.*?</thead>", re.DOTALL)
# A number, which may be a bound, with its unit, or with its interval.
_NUMBER = re.compile(r"((at least|at most) )?[-+]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?( ?%| [kMG]i?B)?( \[[^\]]*\])?")
_BOUND = re.compile(r"\bat (?:least|most) (?=[-\d])")
_NO_VALUE = {"", "-", "...", "None", "none", "NaN", "nan", "<NA>", "not reported"}
_LONG = 24  # characters; the column of a longer text holds a few words per line, and a longer word is broken
_SHORT = 16  # characters; a shorter text of one word does not break at a hyphen, and a longer word may break after _ and /
_WORD = re.compile(rf"[^\s&;]{{{_SHORT + 1},}}")  # not an HTML entity such as &amp;
_JOINT = re.compile(r"[_/](?=\w)")


def lay_out(page: str) -> str:
    """Return the HTML of a table from `DataFrame.to_html` or `Styler.to_html`, with its cells aligned.

    A column whose values are all numbers is aligned right, with its head. The names of the index share a row with those of the
    columns. Texts stay as they are, except that a line cannot break at the spaces of an interval or a bound."""
    rows = [[cell for cell in _CELL.finditer(row) if cell["kind"] == "td"] for row in _ROW.findall(page)]
    columns = zip(*(map(_text_of, row) for row in rows if row), strict=True)
    numeric = [
        any(map(_is_number, column)) and all(_is_number(text) or text in _NO_VALUE for text in column) for column in columns
    ]
    page = _HEAD.sub(lambda head: _join_names(head[0], len(numeric)), page)
    page = _BOUND.sub(lambda bound: bound[0].replace(" ", "\N{NO-BREAK SPACE}"), keep_intervals(page))
    page = _ROW.sub(lambda row: _align_row(row[0], numeric), page)
    return f'<div style="max-width: 100%; overflow-x: auto">\n{page}\n</div>'


def _join_names(head: str, columns: int) -> str:
    """Return a table's head with the index's names in the row of its `columns`. pandas gives them a separate row."""
    *_, above, names = [("", []), ("", []), *((row, [*_CELL.finditer(row)]) for row in _ROW.findall(head))]
    texts = [[_text_of(cell) for cell in cells] for _, cells in (above, names)]
    levels = len(names[1]) - columns
    free = len(texts[0]) == len(texts[1]) and not any(texts[0][:levels]) and not any(texts[1][levels:])
    if levels < 1 or not columns or not free:
        return head
    row = above[0][: above[1][0].start()] + "".join(cell[0] for cell in [*names[1][:levels], *above[1][levels:]]) + "</tr>"
    return head.replace(above[0], "").replace(names[0], row)


def _align_row(row: str, numeric: list[bool]) -> str:
    """Return a row with its cells aligned. `numeric`: for each column, without the index, whether it holds numbers."""
    # pandas leaves out an index cell that the previous row spans, so the columns are counted from the right.
    place = len(numeric) - sum(map(_span_of, _CELL.finditer(row)))

    def align(cell: re.Match) -> str:
        nonlocal place
        at, text = place, _text_of(cell)
        place += _span_of(cell)
        right = numeric[at] if at >= 0 and _span_of(cell) == 1 else _is_number(text)
        style = f"text-align: {'right' if right else 'left'}; vertical-align: top"
        style += "; min-width: 8em" if len(text) > _LONG and not right else ""
        style += _style_of_lines(text)
        return f'<{cell["kind"]}{cell["attributes"]} style="{style}">{_let_words_break(cell["text"])}</{cell["kind"]}>'

    return _CELL.sub(align, row)


def _style_of_lines(text: str) -> str:
    """Return the style that says where a cell's text may break.

    It may break at its own line breaks, not inside a short name such as `case-121`, and anywhere in a word that would widen the
    table."""
    longest = max(map(len, text.split()), default=0)
    if longest == len(text) <= _SHORT and "-" in text:
        return "; white-space: nowrap"
    return "; white-space: pre-wrap" * ("\n" in text) + "; overflow-wrap: anywhere" * (longest > _LONG)


def _let_words_break(text: str) -> str:
    """Return a cell's HTML with a possible line break after each joint of a long name, as in `max_<wbr>seq_<wbr>length`."""
    return text if "<" in text else _WORD.sub(lambda word: _JOINT.sub(r"\g<0><wbr>", word[0]), text)


def _span_of(cell: re.Match) -> int:
    span = _SPAN.search(cell["attributes"])
    return int(span[1]) if span else 1


def _text_of(cell: re.Match) -> str:
    return html.unescape(_TAG.sub("", cell["text"])).replace("\N{NO-BREAK SPACE}", " ").strip()


def _is_number(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text))
