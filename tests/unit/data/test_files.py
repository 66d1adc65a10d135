"""Local data files as people's tools write them: encodings, delimiters, odd columns, missing values, and what is too large."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from medcot_utils.config import load_config
from medcot_utils.data.rows import TEXT_COLUMNS, DataError, load_rows, validate_rows
from medcot_utils.evaluation.mcq.questions import McqError, read_questions

ROWS = [
    {"Question": f"Warum {i}, é?", "Complex_CoT": f"Zunächst; „so“ {i}", "Response": f"Fièvre à 39 °C, {i}."} for i in range(4)
]
HEADER = "Question;Complex_CoT;Response"


def settings(path: Path, *overrides: str):
    return load_config("smoke", [f"dataset.path={json.dumps(str(path))}", *overrides]).dataset


def loaded(folder: Path, rows: list[dict], suffix: str = "jsonl", *overrides: str) -> Dataset:
    path = folder / f"mine.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        texts = [json.dumps(row) for row in rows]
        path.write_text("\n".join(texts) if suffix == "jsonl" else f"[{','.join(texts)}]", encoding="utf-8")
    return load_rows(settings(path, *overrides))


def texts(rows: Dataset) -> list[dict]:
    return rows.select_columns([*TEXT_COLUMNS]).to_list()


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells",
    [[1, "a"], [2**70, -(2**70)], [{"a": 1}, [2]], [{"a": 1}, {"a": "b"}], [None, [[1], ["a"]]], [1.5, True], ["\ud83d", ""]],
    ids=["mixed types", "beyond 64 bits", "nested", "nested, mixed", "lists", "a number and a flag", "half a character"],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_whatever_an_unused_column_holds_stops_nothing(tmp_path, suffix, cells):
    rows = [row | {"notes": cell} for row, cell in zip(ROWS, cells, strict=False)]
    assert texts(loaded(tmp_path, rows, suffix)) == ROWS[:2]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_all_missing_columns_are_named_at_once(tmp_path, suffix):
    message = (
        r"mine\.\w+ has no columns 'Question', 'Response' \(it has Frage, Complex_CoT, Antwort\): name yours with "
        r"--set dataset\.columns\.question=NAME --set dataset\.columns\.response=NAME$"
    )
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, [{"Frage": "q", "Complex_CoT": "c", "Antwort": "a"}], suffix)


def test_of_many_columns_only_some_are_named(tmp_path):
    with pytest.raises(DataError, match=r"\(it has c0, .*, c19 and 480 more\)"):
        loaded(tmp_path, [{f"c{i}": "x" for i in range(500)}])


def test_one_column_for_two_texts_is_refused_by_its_settings(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.columns\.complex_cot and dataset\.columns\.response all name 'Response'"):
        loaded(tmp_path, ROWS, "jsonl", "dataset.columns.complex_cot=Response")


def test_two_columns_may_change_places(tmp_path):
    swapped = ["dataset.columns.complex_cot=Response", "dataset.columns.response=Complex_CoT"]
    assert loaded(tmp_path, ROWS, "jsonl", *swapped)["Response"] == [row["Complex_CoT"] for row in ROWS]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_that_stands_twice_in_the_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"mine.{suffix}"
    names = [*TEXT_COLUMNS, "Question"]
    if suffix == "csv":
        path.write_text(f"{','.join(names)}\na,b,c,d\n", encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array([name]) for name in names], names=names), path)
    with pytest.raises(DataError, match="column 'Question' occurs 2 times in the file"):
        load_rows(settings(path))


# --- id, split and specialty -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_missing_value_is_an_empty_text(tmp_path, suffix):
    rows = [row | {"specialty": "Urology", "split": "train"} for row in ROWS]
    rows[1] |= {"specialty": None, "split": None}
    if suffix in ("json", "jsonl"):
        del rows[2]["specialty"]
        rows[3]["specialty"] = float("nan")
    found = loaded(tmp_path, rows, suffix)
    assert found["split"] == ["train", "", "train", "train"]
    assert found["specialty"] == (["Urology", "", "", ""] if suffix.startswith("json") else ["Urology", "", "Urology", "Urology"])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_specialties_that_are_numbers_are_texts(tmp_path, suffix):
    found = loaded(tmp_path, [row | {"specialty": number} for row, number in zip(ROWS, [3, None, 0, 12], strict=True)], suffix)
    expected = (
        ["3.0", "", "0.0", "12.0"] if suffix == "csv" else ["3", "", "0", "12"]
    )  # to_csv wrote 3.0, and a CSV's text stands
    assert found["specialty"] == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a", None, "c", ""], ["a", "row-1", "c", "row-3"]),
        ([7, None, 9, 10], ["7", "row-1", "9", "10"]),
        ([7, "b", 9.0, 10.5], ["7", "b", "9", "10.5"]),
        ([2**70, 1, 2, 3], [str(2**70), "1", "2", "3"]),
        ([None] * 4, ["row-0", "row-1", "row-2", "row-3"]),
        ([7, 7, None, 9], ["row-0", "row-1", "row-2", "row-3"]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        (["a\ud83d", "b", "c", "d"], ["a?", "b", "c", "d"]),
    ],
    ids=[
        "some missing",
        "numbers, one missing",
        "mixed types",
        "beyond 64 bits",
        "all missing",
        "one twice",
        "numbers",
        "half a character",
    ],
)
def test_ids_of_any_kind_tell_the_rows_apart(tmp_path, ids, expected):
    rows = [row | {"id": row_id} for row, row_id in zip(ROWS, ids, strict=True)]
    assert loaded(tmp_path, rows)["id"] == expected


def test_an_id_in_a_csv_keeps_its_leading_zeros(tmp_path):
    rows = [row | {"id": f"00{i}"} for i, row in enumerate(ROWS)]
    assert loaded(tmp_path, rows, "csv")["id"] == ["000", "001", "002", "003"]


def test_labels_of_a_data_set_with_classes_are_cleaned_too(tmp_path):
    columns = {"specialty": [1, 0, None, 1], "id": [1.0, None, 3.0, 4.0], "split": ["train", None, "x", "train"]}
    features = Features(
        {name: Value("string") for name in TEXT_COLUMNS}
        | {"specialty": ClassLabel(names=["Urology", "Surgery"]), "id": Value("float64"), "split": Value("string")}
    )
    held = Dataset.from_dict({name: [row[name] for row in ROWS] for name in TEXT_COLUMNS} | columns, features=features)
    held.to_parquet(tmp_path / "train.parquet")
    found = load_rows(load_config("smoke", [f"dataset.name={tmp_path}"]).dataset)
    assert found["specialty"] == ["Surgery", "Urology", "", "Surgery"]
    assert (found["id"], found["split"]) == (["1", "row-1", "3", "4"], ["train", "", "x", "train"])
    assert texts(found) == ROWS


def test_a_data_set_whose_files_differ_in_type_is_one_clear_error(tmp_path):
    for name, row in {"a": ROWS[0], "b": {"Question": {"a": 1}, "Response": ["b"]}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"data set \S+ could not be loaded from the Hub: An error occurred while") as caught:
        load_rows(load_config("smoke", [f"dataset.name={tmp_path}"]).dataset)
    assert "\n" not in str(caught.value)
    with pytest.raises(McqError, match=r"could not be loaded from the Hub \(An error occurred"):
        read_questions(str(tmp_path), split="train")


# --- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_with_half_a_character_drops_its_row_only(tmp_path):
    kept, report = validate_rows(loaded(tmp_path, [ROWS[0], ROWS[1] | {"Response": "So \ud83d."}, *ROWS[2:]]))
    assert (len(kept), report.dropped) == (3, {"Response holds half a character": 1})


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_read_over(tmp_path, suffix):
    (tmp_path / "x").mkdir()
    loaded(tmp_path / "x", ROWS, suffix)
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(codecs.BOM_UTF8 + (tmp_path / "x" / path.name).read_bytes())
    assert texts(load_rows(settings(path))) == ROWS


def test_marks_between_joined_files_are_read_over(tmp_path):
    path = tmp_path / "joined.jsonl"
    path.write_bytes(b"".join(codecs.BOM_UTF8 + json.dumps(row).encode() + b"\n" for row in ROWS))
    assert texts(load_rows(settings(path))) == ROWS


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_in_utf_16_is_refused_by_that_name(tmp_path, suffix, encoding):
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(json.dumps(ROWS if suffix == "json" else ROWS[0]).encode(encoding))
    with pytest.raises(DataError, match=rf"not valid {suffix} \(the text is in {encoding.upper()}.*: save it as UTF-8"):
        load_rows(settings(path))


@pytest.mark.parametrize(("suffix", "opening"), [("json", "["), ("json", '{"a":'), ("jsonl", "[")])
def test_json_that_is_nested_too_deep_is_refused_in_one_line(tmp_path, suffix, opening):
    path = tmp_path / f"mine.{suffix}"
    path.write_text(opening * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match="nested too deep"):
        load_rows(settings(path))


# --- a spreadsheet's CSV ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "delimiter", "said"),
    [
        ("cp1252", ";", "WINDOWS-1252, with semicolons"),
        ("utf-8", ";", "UTF-8, with semicolons"),
        ("utf-8-sig", ";", "UTF-8, with semicolons"),
        ("cp1252", ",", "WINDOWS-1252, with commas"),
        ("utf-16", "\t", "UTF-16, with tabs"),
        ("utf-8", "|", "UTF-8, with bars"),
        ("utf-8", ",", None),
        ("utf-8-sig", ",", None),
    ],
)
def test_a_spreadsheets_csv_is_read_and_what_was_found_is_said(tmp_path, capsys, encoding, delimiter, said):
    path = tmp_path / "tabelle.csv"
    path.write_bytes(pd.DataFrame(ROWS).to_csv(index=False, sep=delimiter).encode(encoding))
    assert texts(load_rows(settings(path))) == ROWS
    assert texts(load_rows(settings(path))) == ROWS, "as several checks of a run do"
    assert capsys.readouterr().out == (f"tabelle.csv: read as {said} between the columns\n" if said else ""), "said once"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Perché così si esclude l’infarto; la pressione è più alta e la funzionalità è già nota"),
        ("cp1252", "Vilken undersökning görs först? Först tänker jag på hjärtinfarkt, därefter på lungemboli"),
        ("cp1250", "Najpierw myślę o zawale, później sprawdzam ciśnienie i czynność nerek, gdyż ból jest nagły"),
        ("cp1251", "Сначала думаю об инфаркте, затем проверяю давление и функцию почек"),
        ("gb18030", "一名四十岁男子突发胸痛并放射至左臂，既往有高血压病史，首先应当做什么检查？"),
    ],
)
def test_a_csv_in_an_older_encoding_keeps_its_letters(tmp_path, encoding, text):
    path = tmp_path / "old.csv"
    lines = [",".join(TEXT_COLUMNS), *["plain,plain,plain"] * 50, *[f'"{text} {i}","{text}","{text}"' for i in range(5)]]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    assert load_rows(settings(path))["Response"][-1] == text


def test_a_mapped_header_with_a_comma_finds_the_semicolon(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id;Frage, kurz;Complex_CoT;Response\na;b, c;d;e\n", encoding="utf-8")
    assert load_rows(settings(path, 'dataset.columns.question="Frage, kurz"'))["Question"] == ["b, c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{HEADER}\nä;b;c;d\n".encode(), "the first row has more fields than the header has columns"),
        (f"{HEADER}\na;b;c\na;b;c;d\n".encode(), "Expected 3 fields in line 3, saw 4"),
        (f"{HEADER}\näöü;ß;c\nä;".encode() + b"\xc3;c\n", "UTF-8 with a broken character in line 3"),
        (b"Frage;Gedanken\na;b\n", r"has no columns 'Question', .* \(it has Frage, Gedanken\)"),
    ],
    ids=["too many fields", "too many later", "broken UTF-8", "semicolons and other columns"],
)
def test_a_csv_that_cannot_be_right_is_named(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(settings(path))


# --- too large -------------------------------------------------------------------------------------------------------


def test_a_small_parquet_of_more_than_memory_is_refused_unread(tmp_path):
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 110_000, pa.int32()), pa.array(["x" * 10_000]))
    path = tmp_path / "small.parquet"
    pq.write_table(pa.table(dict.fromkeys(TEXT_COLUMNS, long)), path)
    assert path.stat().st_size < 1_000_000
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"small\.parquet: its rows take 3\.3 GB in memory, more than 1 GB \(MAX_DATA_BYTES in"):
        load_rows(settings(path))
    assert pa.total_allocated_bytes() - before < 100e6


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_above_the_limit_is_refused_by_its_name(tmp_path, monkeypatch, suffix):
    loaded(tmp_path, ROWS, suffix)
    monkeypatch.setattr("medcot_utils.data.files.MAX_DATA_BYTES", 200)
    with pytest.raises(DataError, match=r"its rows take 0\.0 GB in memory, more than 2e-07 GB \(MAX_DATA_BYTES"):
        load_rows(settings(tmp_path / f"mine.{suffix}"))
