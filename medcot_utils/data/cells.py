"""The cells of a data set, as files and the Hub give them, made texts and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from numbers import Number
from uuid import UUID


@dataclass(frozen=True)
class OtherCell:
    """Stand for a cell that is not read, since it is no text and no number: one of `KINDS`."""

    kind: str

    def __repr__(self) -> str:
        return self.kind


MISSING, FLAG, NUMBER, TIME, LIST, OBJECT, BYTES, OTHER = KINDS = (
    *("missing", "true or false", "a number", "a date or a time"),
    *("a list", "an object", "bytes", "of another type"),
)
_KINDS = ((bool, FLAG), (Number, NUMBER), (date | time | timedelta, TIME), (list | tuple, LIST), (dict, OBJECT), (bytes, BYTES))
_LONGEST_LABEL = 1000  # characters: ids and specialties stand in tables, records, and the report
# What stands for a text that Arrow cannot hold beside the others, and says why `validate_rows` drops its row.
NOT_A_STRING = {kind: f"\0is {kind}" if kind == MISSING else f"\0is not a string ({kind})" for kind in KINDS}
HALF_A_CHARACTER = "\0holds half a character"
MARKS = frozenset([*NOT_A_STRING.values(), HALF_A_CHARACTER])


def kind_of(cell: object) -> str:
    """Return which of `KINDS` a cell is that is no text."""
    if cell is None or (isinstance(cell, Number) and cell != cell):  # NaN
        return MISSING
    if isinstance(cell, OtherCell):
        return cell.kind
    return next((kind for types, kind in _KINDS if isinstance(cell, types)), OTHER)


def as_text(value: object) -> str:
    """Return the cell of an id, split or specialty as text: empty if it is missing, and 3 for 3.0, which is how tables hold
    whole numbers if one is missing. Raises ValueError for a list, an object, or bytes."""
    if isinstance(value, str | UUID):
        return str(value)
    if (kind := kind_of(value)) == MISSING:
        return ""
    if isinstance(value, OtherCell) or kind not in (FLAG, NUMBER, TIME):
        raise ValueError(f"is {value!r:.60}; expected a text or a number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def is_whole(text: str) -> bool:
    """Return whether a text can be written as UTF-8: half of a surrogate pair, left by a cut in JSON, cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def clean_text(cell: object) -> str:
    """Return a text as it is, and for anything else a mark that `validate_rows` counts: Arrow would stop at mixed types."""
    if not isinstance(cell, str):
        return NOT_A_STRING[kind_of(cell)]
    if not is_whole(cell):
        return HALF_A_CHARACTER
    return cell


def _clean_label(cell: object) -> str:
    text = as_text(cell).encode("utf-8", "replace").decode()  # half a character becomes a question mark
    if len(text) > _LONGEST_LABEL:
        raise ValueError(f"holds {len(text):,} characters; expected at most {_LONGEST_LABEL:,}")
    return text


def _clean_ids(cells: Sequence[object], texts: Sequence[str]) -> list[int] | list[str]:
    """Return ids that tell answers and losses apart: the given ones, or `row-N` for one that is missing and for all if some
    stand twice."""
    numbers = all(type(cell) is int and abs(cell) < 2**63 for cell in cells)
    ids = list(cells) if numbers else [text or f"row-{index}" for index, text in enumerate(texts)]
    return ids if len(set(ids)) == len(ids) else [f"row-{index}" for index in range(len(ids))]


def clean_labels(name: str, cells: Sequence[object]) -> list[int] | list[str]:
    """Return the cells of id, specialty or split. Raises ValueError for a list, an object, bytes, or a long text, and its row."""
    texts: list[str] = []
    try:
        for cell in cells:
            texts.append(_clean_label(cell))
    except ValueError as error:
        raise ValueError(
            f"the column `{name}` cannot be used, row-{len(texts)} {error}. Rename it if it means something else"
        ) from error
    return _clean_ids(cells, texts) if name == "id" else texts
