"""Cells of other types than texts, in each kind of file and on the Hub: one clear line, or what they mean."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value

from medcot_utils.config import load_config
from medcot_utils.data.rows import DataError, check_data, load_rows, validate_rows

SIZE = 12
SUBJECTS = ["ankle", "back", "chest", "ear", "elbow", "finger", "heel", "jaw", "knee", "neck", "tooth", "wrist"]
COLUMNS = {
    "Question": [f"Why does {one} hurt in winter?" for one in SUBJECTS],
    "Complex_CoT": [f"So I think of {one}." for one in SUBJECTS],
    "Response": [f"It is {one}." for one in SUBJECTS],
}
CONFIG = ("dataset.num_rows=6", "dataset.held_out_rows=4", "evaluation.num_questions=2", "dataset.repeats=report")
LONG = "x" * 1001


def config(path: Path):
    return load_config("smoke", [f"dataset.path={json.dumps(str(path))}", *CONFIG])


def written(folder: Path, suffix: str, column: str, cells) -> Path:
    """A file of this kind in which one column holds these cells."""
    path = folder / f"mine.{suffix}"
    columns = COLUMNS | {column: cells}
    if suffix == "parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == "csv":
        pd.DataFrame(columns).to_csv(path, index=False)
    else:
        path.write_text(
            "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True))
        )
    return path


def alike(cell, kind=None) -> pa.Array:
    return pa.array([cell] * SIZE, kind)


def broken_utf8() -> pa.Array:
    ends = pa.py_buffer(np.arange(SIZE + 1, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), SIZE, [None, ends, pa.py_buffer(b"a" * (SIZE - 1) + b"\xff")])


MOMENT = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
TENSOR = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int32(), [2]), alike([1, 2], pa.list_(pa.int32(), 2)))
# {kind: (cells, as a label)}; a label of None is refused.
PARQUET = {
    "a number": [(alike(7), "7"), (alike(7.0), "7"), (alike(decimal.Decimal("1.5")), "1.5"), (alike(7).dictionary_encode(), "7")],
    "true or false": [(alike(True), "True")],
    "a date or a time": [
        (alike(MOMENT, pa.timestamp("ns", "UTC")), "2020-01-02 00:00:00+00:00"),
        (alike(MOMENT.date()), "2020-01-02"),
        (alike(2**62, pa.duration("s")), None),
        (alike(2**62, pa.timestamp("us")), None),
    ],
    "a list": [(alike(["a"]), None), (alike([{"role": "user"}]), None), (TENSOR, None)],
    "an object": [(alike({"a": {"b": 1}}), None), (alike([("a", 1)], pa.map_(pa.string(), pa.int64())), None)],
    "bytes": [(alike(b"abc"), None), (alike(b"\xff\x00"), None), (alike(b"abcd", pa.binary(4)), None)],
    "of another type": [(alike(uuid.UUID(int=7).bytes, pa.uuid()), str(uuid.UUID(int=7)))],
}
READ = [
    pa.array(COLUMNS["Response"]).dictionary_encode(),
    pa.array(COLUMNS["Response"], pa.large_string()),
    pa.array(COLUMNS["Response"]).cast(pa.string_view()),
]
JSON = {
    "a number": [7, 7.5, 10**400, float("inf")],
    "true or false": [True],
    "a list": [[], ["a"], [[1], "a"]],
    "an object": [{}, {"a": {"b": [1]}}],
}
CSV = {"a number": [7, 7.5, 10**30], "true or false": [True]}
TYPED = [("parquet", kind, cells) for kind, held in PARQUET.items() for cells, _ in held]
TYPED += [("jsonl", kind, [cell] * SIZE) for kind, held in JSON.items() for cell in held]
TYPED += [("csv", kind, [cell] * SIZE) for kind, held in CSV.items() for cell in held]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(("suffix", "kind", "cells"), TYPED)
def test_a_column_of_another_type_is_one_line(tmp_path, suffix, kind, cells, column):
    message = rf"^mine\.{suffix}: no usable row is left of 12: {column} is not a string \({kind}\) in 12 rows \(first: row-0\)\. "
    with pytest.raises(DataError, match=message) as error:
        check_data(config(written(tmp_path, suffix, column, cells)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_column_of_missing_values_is_one_line(tmp_path, suffix):
    with pytest.raises(DataError, match=r"^mine\.\w+: no usable row .* 12: Response is missing in 12 rows \(first: row-0\)"):
        check_data(config(written(tmp_path, suffix, "Response", [None] * SIZE)))


@pytest.mark.parametrize("cells", READ, ids=lambda cells: str(cells.type))
def test_texts_are_read_however_arrow_holds_them(tmp_path, cells):
    path = written(tmp_path, "parquet", "Response", cells)
    assert load_rows(config(path).dataset)["Response"] == COLUMNS["Response"]


def test_rows_of_other_types_are_left_out_and_named(tmp_path):
    cells = [["a"], 7, None, {"a": 1}, *COLUMNS["Response"][4:]]
    said = check_data(config(written(tmp_path, "jsonl", "Response", cells)))
    assert said.endswith(
        "; 4 of 12 rows cannot be used: Response is not a string (a list) in 1 row (first: row-0); Response is not a string (a "
        "number) in 1 row (first: row-1); Response is missing in 1 row (first: row-2); and 1 more"
    )


def test_a_text_of_broken_bytes_drops_its_row_only(tmp_path):
    path = written(tmp_path, "parquet", "Response", broken_utf8())
    assert "1 of 12 rows cannot be used: Response holds half a character in 1 row (first: row-11)" in check_data(config(path))
    _, report = validate_rows(load_rows(config(path).dataset))
    assert report.examples == {"Response holds half a character": "row-11"}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_text_of_megabytes_drops_its_row_only(tmp_path, column):
    cells = ["x" * 5_000_000, "y" * 100_001, "z" * 100_000, *COLUMNS[column][3:]]
    said = check_data(config(written(tmp_path, "parquet", column, cells)))
    assert f"2 of 12 rows cannot be used: {column} is longer than 100,000 characters in 2 rows (first: row-0)" in said


# --- labels ----------------------------------------------------------------------------------------------------------

LABELS = [("parquet", cells, label) for held in PARQUET.values() for cells, label in held]
LABELS += [("jsonl", [cell] * SIZE, None) for kind in ("a list", "an object") for cell in JSON[kind]]
LABELS += [(suffix, [LONG] * SIZE, None) for suffix in ("parquet", "jsonl", "csv")]


@pytest.mark.parametrize("column", ["id", "split", "specialty"])
@pytest.mark.parametrize(("suffix", "cells", "label"), LABELS)
def test_a_label_is_a_text_or_one_line_that_names_it(tmp_path, suffix, cells, label, column):
    settings = config(written(tmp_path, suffix, column, cells)).dataset
    if label is not None:
        assert str(load_rows(settings)[column][0]) == (label if column != "id" else "row-0"), (
            "ids that all stand twice are replaced"
        )
        return
    message = rf"^mine\.{suffix}: the column `{column}` cannot be used, row-0 (is |holds 1,001 char).*; expected .*Rename it"
    with pytest.raises(DataError, match=message) as error:
        load_rows(settings)
    assert "\n" not in str(error.value)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_column_named_in_another_case_is_proposed(tmp_path, suffix):
    cells = COLUMNS["Response"]
    path = written(tmp_path, suffix, "response", cells)
    assert load_rows(config(path).dataset)["Response"] == cells, "beside the one of that very name it is another column"
    pq.write_table(pa.table({name.lower(): cells for name, cells in COLUMNS.items()}), path.with_suffix(".parquet"))
    settings = " ".join(f"--set dataset.columns.{name.lower()}={name.lower()}" for name in COLUMNS)
    with pytest.raises(DataError, match=rf"mine\.parquet has no columns .*: name yours with {settings}$"):
        load_rows(config(path.with_suffix(".parquet")).dataset)


@pytest.mark.parametrize(("column", "read"), [("Split", "split"), (" ID", "id"), ("SPECIALTY", "specialty")])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_label_in_another_case_is_not_left_out_silently(tmp_path, capsys, suffix, column, read):
    load_rows(config(written(tmp_path, suffix, column, ["train"] * 6 + ["test"] * 6)).dataset)
    assert f"mine.{suffix}: the column {column} is not used, since only `{read}` is" in capsys.readouterr().out
    load_rows(config(written(tmp_path, suffix, read, ["train"] * 6 + ["test"] * 6)).dataset)
    assert capsys.readouterr().out == ""


# --- on the Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["Response", "specialty"])
@pytest.mark.parametrize(
    ("feature", "cell", "held"),
    [
        (Value("int64"), 7, "int64"),
        (Value("binary"), b"a", "binary"),
        (Value("duration[s]"), datetime.timedelta(1), r"duration\[s\]"),
        (List(Value("string")), ["a"], "List"),
        ({"a": Value("string")}, {"a": "b"}, "dict"),
        (Image(), {"path": "gone.png", "bytes": b"no image"}, "Image"),
    ],
)
def test_types_on_the_hub_are_refused_before_they_are_decoded(tmp_path, column, feature, cell, held):
    features = {name: Value("string") for name in COLUMNS} | {column: feature}
    rows = Dataset.from_dict(COLUMNS | {column: [cell] * SIZE}, features=Features(features))
    rows.to_parquet(tmp_path / "train.parquet")  # a folder is loaded as a data set on the Hub is
    settings = load_config("smoke", [f"dataset.name={tmp_path}"]).dataset
    if column == "specialty" and held in ("int64", r"duration\[s\]"):
        assert load_rows(settings)["specialty"][0] in ("7", "1 day, 0:00:00")
        return
    with pytest.raises(DataError, match=rf"\S+: the column .{column}. (holds {held} in every row|cannot be used, row-0 is b)"):
        load_rows(settings)
