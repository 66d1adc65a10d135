"""Read a local data file as people's tools write it: only the columns that are used, and no more than memory holds."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.data.cells import LIST, OBJECT, TIME, OtherCell
from medcot_utils.errors import MedcotError
from medcot_utils.plain_text import say
from medcot_utils.text_files import decode, parse_json

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# A hundred times the article's data set. Reading takes a few times as much memory.
MAX_DATA_BYTES = 1_000_000_000
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_CELL_BYTES = 64  # about what Python holds for a short cell

# The cells of each column that was asked for, as the file has them.
Cells = dict[str, list[object]]
# Given the file's columns, returns those to read, or raises DataError.
ChooseColumns = Callable[[Sequence[str]], Iterable[str]]


class DataError(MedcotError):
    """Say why the data cannot be used: the file, row or column, what was expected and what to do."""


class TooLargeError(ValueError):
    """Say that rows take more than MAX_DATA_BYTES."""


def read_file(path: Path, choose: ChooseColumns) -> Cells:
    """Return the chosen columns of a json, jsonl, csv or parquet file; whatever the others hold is not looked at.

    A CSV file's encoding and delimiter are found, and said once in a process unless they are UTF-8 and the comma. Raises
    DataError if the file is missing, empty, unreadable or larger than MAX_DATA_BYTES."""
    import pyarrow as pa

    if path.suffix not in SUFFIXES:
        raise DataError(f"dataset.path {path.name}: expected a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"dataset.path {path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"dataset.path {path.name}: the file is empty")
    read = {".parquet": _read_parquet, ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json}[path.suffix]
    try:
        check_size(path.stat().st_size)
        cells = read(path, choose)
    except TooLargeError as error:
        raise DataError(f"dataset.path {path.name}: {error}") from error
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:  # pandas' and json's parse errors are ValueErrors
        raise DataError(f"dataset.path {path.name}: not valid {path.suffix[1:]} ({error})") from error
    if not any(cells.values()):
        raise DataError(f"dataset.path {path.name}: the file holds no rows")
    return cells


def check_size(size: int) -> None:
    """Raise TooLargeError if rows of so many bytes are more than MAX_DATA_BYTES."""
    if size > MAX_DATA_BYTES:
        raise TooLargeError(
            f"its rows take {size / 1e9:,.1f} GB in memory, more than {MAX_DATA_BYTES / 1e9:g} GB (MAX_DATA_BYTES in "
            f"medcot_utils/data/files.py): give fewer rows"
        )


@cache
def _say_how(path: Path, encoding: str, delimiter: str) -> None:
    """Say how a file is read: only once, because several checks read it."""
    say(f"{path.name}: read as {encoding}, with {_DELIMITERS[delimiter]} between the columns")


def _choose_once(names: Sequence[str], choose: ChooseColumns) -> list[str]:
    chosen = list(choose(names))
    if twice := [name for name in chosen if Counter(names)[name] > 1]:
        raise DataError(f"column {twice[0]!r} occurs {Counter(names)[twice[0]]} times in the file: rename the others")
    return chosen


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, choose: ChooseColumns) -> Cells:
    text = decode(path.read_bytes())
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # str.splitlines would cut texts at U+2028 and its like
            line = line.removeprefix("\ufeff")  # files with a mark, joined
            try:
                rows.extend([parse_json(line)] if line.strip() else [])
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    else:
        rows = parse_json(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects")
    if not rows:
        return {}
    return {name: [row.get(name) for row in rows] for name in choose([*dict.fromkeys(name for row in rows for name in row)])}


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, choose: ChooseColumns) -> Cells:
    import pandas as pd

    text, encoding = _decode_any(path.read_bytes())
    delimiter, header = _find_delimiter(text, choose)
    if encoding != "UTF-8" or delimiter != ",":
        _say_how(path, encoding, delimiter)
    frame = pd.read_csv(
        io.StringIO(text),
        sep=delimiter,
        keep_default_na=False,
        low_memory=False,  # in pieces, a column could hold numbers here and texts there
        dtype={name: str for name in ("id", "split", "specialty")},
    )
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first column for the rows' names
        raise ValueError("the first row has more fields than the header has columns")
    return {name: frame[name].tolist() for name in _choose_once(header, choose)}


def _decode_any(content: bytes) -> tuple[str, str]:
    """Return the text and its encoding's name. Raises ValueError if none is found, or if a byte is broken in UTF-8 text."""
    import chardet

    try:
        return content.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        first = error
    text = content.decode("utf-8", "replace")
    if len(text) - len(text.encode("ascii", "ignore")) > 2 * text.count("\ufffd"):
        raise ValueError(f"UTF-8 with a broken character in line {content[: first.start].count(10) + 1}: {first}")
    # From the first line that tells encodings apart; chardet tells those of Europe apart, which charset-normalizer confuses.
    begin = content.rfind(b"\n", 0, first.start) + 1
    encoding = chardet.detect(content[begin : begin + 200_000])["encoding"]
    try:
        return content.decode(encoding or "ascii").removeprefix("\ufeff"), str(encoding)
    except (UnicodeDecodeError, LookupError):
        raise ValueError("its encoding was not recognized: save it as UTF-8") from first


def _find_delimiter(text: str, choose: ChooseColumns) -> tuple[str, list[str]]:
    """Return the delimiter whose header has the columns to read, or else the most columns; and that header."""
    # csv.Sniffer does not know the columns: it takes the comma in a header such as `Question, English;Response`.
    beginning = text[:1_000_000]
    headers = {
        delimiter: next(filter(None, csv.reader(io.StringIO(beginning, newline=""), delimiter=delimiter)), [])
        for delimiter in _DELIMITERS
    }
    for delimiter, header in headers.items():
        with suppress(DataError):
            choose(header)
            return delimiter, header
    return max(headers.items(), key=lambda one: len(one[1]))


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, choose: ChooseColumns) -> Cells:
    """Read the columns with each different text held once, and measure them before they are copied out: a file of 130 kB can
    hold one long text a million times."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        chosen = _choose_once(schema.names, choose)
        unread = {name: _kind_of_type(schema.field(name).type) for name in chosen}
        flat = [name for name in chosen if unread[name] is None]
        check_size(_stored_bytes(file.metadata, flat) + file.metadata.num_rows * _CELL_BYTES * len(chosen))
        rows = file.metadata.num_rows
    with pq.ParquetFile(path, read_dictionary=flat) as file:
        table = file.read(columns=flat)
    check_size(sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks))
    return {name: [OtherCell(kind)] * rows if (kind := unread[name]) else _cells(table[name]) for name in chosen}


def _kind_of_type(kept: pa.DataType) -> str | None:
    """Return which of `KINDS` the cells of a column are that is not worth reading; None for one that is."""
    import pyarrow as pa

    stored = kept.storage_type if isinstance(kept, pa.BaseExtensionType) else kept
    if not pa.types.is_nested(stored):
        return None
    return OBJECT if pa.types.is_struct(stored) or pa.types.is_map(stored) else LIST


def _cells(column: pa.ChunkedArray) -> list[object]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_cell(scalar) for scalar in column]


def _cell(scalar: pa.Scalar) -> object:
    """Return a cell that Python may be unable to hold: a time outside its years, or a text that is not UTF-8, whose broken
    bytes become halves of characters."""
    import pyarrow as pa

    held = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    try:
        return held.as_py()
    except UnicodeDecodeError:
        return held.as_buffer().to_pybytes().decode(errors="surrogateescape")
    except (ValueError, OverflowError):
        return OtherCell(TIME)


def _stored_bytes(metadata: pa.parquet.FileMetaData, names: Sequence[str]) -> int:
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in names)


def _text_bytes(chunk: pa.Array) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(chunk.type):
        return chunk.nbytes
    return pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
