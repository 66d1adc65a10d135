"""Texts of other people, shown as they are: no part of one is taken for an order to a terminal, a formula, or Markdown.

HTML itself is escaped by html.escape, jinja2 and pandas. Standard library only: a Kaggle session speaks through it before the
pinned stack is installed."""

from __future__ import annotations

import re
from typing import TextIO

# Control characters but tab and line feed (C0, DEL, C1), what embeds, overrides or isolates a reading direction, and lone
# surrogates, which no stream can encode.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Within a line; before a name that a colon ends; at its beginning, where lists and headings begin; and what MathJax looks for.
_MARKDOWN = re.compile(r"[&<>`*|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|:(?=\w+:)|^[-+=#\[](?!\d)|^\d{1,9}[.)](?=\s)")
# An interval, as in `[-0.1, 0.3]` or `[45 %, 52 %]`.
_INTERVAL = re.compile(r"\[-?\d[^\s\]]*(?: %)?, -?\d[^\s\]]*(?: %)?\]")
_FORMULA = re.compile(r"[$\\]")


def show_controls(text: str) -> str:
    r"""Return a text with its line breaks as line feeds, and every other control character written out, as in `\x1b`."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], re.sub("\r\n?", "\n", text))


def one_line(text: str) -> str:
    """Return a text as one line, with control characters written out: for names and messages, whatever they quote."""
    return show_controls(" ".join(part.strip() for part in text.splitlines()))


def say(*lines: object, stream: TextIO | None = None, flush: bool = False) -> None:
    """Print each line as one line (`one_line`), to standard output or another stream."""
    for line in lines:
        print(one_line(str(line)), file=stream, flush=flush)


def hide_formulas(page: str) -> str:
    r"""Return HTML in which MathJax finds no formula: each `$` and `\` stands in an element of its own."""
    return _FORMULA.sub(lambda found: f"<span>{_refer(found[0])}</span>", page)


def keep_intervals(text: object) -> str:
    """Return a text whose intervals, as in `[-0.1, 0.3]`, have no-break spaces: none ends a line in its middle."""
    return _INTERVAL.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), str(text))


def escape_markdown(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is, in a table's cell too, but not within backticks."""
    return hide_formulas(_MARKDOWN.sub(lambda found: found[0][:-1] + _refer(found[0][-1]), one_line(text)))


def _refer(char: str) -> str:
    return f"&#{ord(char)};"
