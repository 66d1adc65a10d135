"""Rows: loaders, what each unusable file is answered with, validation, the split, the evaluation questions."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from medcot_utils.config import load_config
from medcot_utils.data.prompts import ARTICLE_ANSWER, ARTICLE_QUESTION
from medcot_utils.data.rows import (
    TEXT_COLUMNS,
    DataError,
    check_data,
    choose_questions,
    drop_repeats,
    load_rows,
    split_rows,
    validate_rows,
)
from medcot_utils.run.artifacts import SHIPPED_CASES

ROWS = [
    {"Question": f"Question {i}, é — why?", "Complex_CoT": f"Line\nof thought {i}", "Response": f'"{i}", so.'} for i in range(4)
]


def settings(path: Path | None = None, *overrides: str):
    given = [*overrides] if path is None else [f"dataset.path={json.dumps(str(path))}", *overrides]
    return load_config("smoke", given).dataset


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def dataset(*rows: dict) -> Dataset:
    filled = [{"id": f"r{i}", "Question": f"q{i}", "Complex_CoT": "c", "Response": "a"} | row for i, row in enumerate(rows)]
    return Dataset.from_list(filled)


# --- load --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows_with_ids(tmp_path, suffix):
    rows = load_rows(settings(write(tmp_path / f"mine.{suffix}", ROWS)))
    assert rows.to_list() == [row | {"id": f"row-{i}"} for i, row in enumerate(ROWS)]


def test_shipped_cases_load_with_ids_specialties_and_splits():
    rows = load_rows(settings())
    shipped = [json.loads(line) for line in SHIPPED_CASES.read_text(encoding="utf-8").splitlines()]
    assert rows.to_list() == [{key: row[key] for key in rows.column_names} for row in shipped]
    assert set(rows.column_names) == {*TEXT_COLUMNS, "id", "specialty", "split"}


def test_a_data_set_that_needs_its_own_code_is_one_line(tmp_path):
    script = tmp_path / "evil" / "evil.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    with pytest.raises(DataError, match=r"could not be loaded from the Hub: Dataset scripts are no longer supported.*evil\.py"):
        load_rows(settings(None, f"dataset.name={json.dumps(str(script.parent))}", "dataset.subset=null"))
    assert not (tmp_path / "was here").exists()


def test_columns_are_mapped_by_name_and_others_left_out(tmp_path):
    mine = [{"Frage": "q", "Gedanken": "c", "Antwort": "a", "Question": "not this", "id": 7, "note": 1.5}]
    names = [f"dataset.columns.{key}={name}" for key, name in [("question", "Frage"), ("complex_cot", "Gedanken")]]
    rows = load_rows(settings(write(tmp_path / "x.json", mine), *names, "dataset.columns.response=Antwort"))
    assert rows.to_list() == [{"Question": "q", "Complex_CoT": "c", "Response": "a", "id": 7}]


def test_line_separators_within_a_text_do_not_cut_a_jsonl_row(tmp_path):
    row = ROWS[0] | {"Complex_CoT": "one\u2028two\x85three"}
    assert load_rows(settings(write(tmp_path / "x.jsonl", [row])))["Complex_CoT"] == [row["Complex_CoT"]]


def test_a_csv_cell_that_says_NA_stays_a_text(tmp_path):
    rows = load_rows(settings(write(tmp_path / "x.csv", [ROWS[0] | {"Response": "NA"}])))
    assert rows["Response"] == ["NA"]


GOOD_LINE = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl: no such file"),
        ("folder.csv", "<folder>", "folder.csv: no such file"),
        ("empty.csv", "", r"empty\.csv: the file is empty"),
        ("rows.xlsx", "x", r"rows\.xlsx: expected a file ending in \.json, \.jsonl, \.csv, \.parquet"),
        ("bad.jsonl", f"{GOOD_LINE}\n\n{{oops\n", r"bad\.jsonl: not valid jsonl \(line 3: "),
        ("bad.json", "[{]", r"bad\.json: not valid json \("),
        ("bad.parquet", "PAR1 not really", r"bad\.parquet: not valid parquet \("),
        ("bad.csv", 'a,b\n"1,2\n3', r"bad\.csv: not valid csv \("),
        ("object.json", '{"rows": []}', r"object\.json: not valid json \(expected a list of objects\)"),
        ("texts.jsonl", '"a"\n"b"\n', r"texts\.jsonl: not valid jsonl \(expected a list of objects\)"),
        ("none.json", "[]", r"none\.json: the file holds no rows"),
        ("blank.jsonl", "\n \n", r"blank\.jsonl: the file holds no rows"),
        ("header.csv", "Question,Complex_CoT,Response\n", r"header\.csv: the file holds no rows"),
        ("latin.jsonl", b'{"Question": "\xe9"}', r"latin\.jsonl: not valid jsonl \(.*utf-8"),
    ],
)
def test_an_unusable_file_is_named_with_what_is_wrong(tmp_path, name, text, message):
    path = tmp_path / name
    if text == "<folder>":
        path.mkdir()
    elif isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(settings(path))


@pytest.mark.parametrize(("column", "key"), [("Question", "question"), ("Complex_CoT", "complex_cot"), ("Response", "response")])
def test_a_missing_column_names_the_setting_that_maps_it(tmp_path, column, key):
    path = write(tmp_path / "x.csv", [{("other" if name == column else name): text for name, text in ROWS[0].items()}])
    with pytest.raises(DataError, match=rf"x\.csv has no column '{column}' .*other.*--set dataset\.columns\.{key}=NAME"):
        load_rows(settings(path))


# --- validate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"Question": 7}, "Question is not a string (a number)"),
        ({"Complex_CoT": None}, "Complex_CoT is missing"),
        ({"Response": ["a"]}, "Response is not a string (a list)"),
        ({"Response": " \n"}, "Response is empty"),
        ({"Complex_CoT": "so </think> then"}, "Complex_CoT holds </think>"),
        ({"Question": "<think>?"}, "Question holds <think>"),
        ({"Response": "end<|end_of_text|>"}, "Response holds <|end_of_text|>"),
        ({"Question": "QUESTION 0; é why"}, "duplicate question"),
    ],
)
def test_an_unusable_row_is_left_out_and_counted_by_its_reason(tmp_path, row, reason):
    path = write(tmp_path / "x.json", [*ROWS, ROWS[3] | {"Question": "another"} | row])
    kept, report = validate_rows(load_rows(settings(path)), ["<|end_of_text|>"])
    assert [text for text in kept["Question"]] == [text["Question"] for text in ROWS]
    assert (report.rows_in, report.rows_kept, report.dropped, report.examples) == (5, 4, {reason: 1}, {reason: "row-4"})


def test_a_column_of_numbers_only_is_reported_as_not_text(tmp_path):
    path = write(tmp_path / "x.csv", [row | {"Response": i} for i, row in enumerate(ROWS)])
    with pytest.raises(DataError, match=r"no usable row is left of 4: Response is not a string \(a number\) in 4 rows"):
        validate_rows(load_rows(settings(path)))


def test_the_validation_table_counts_each_reason_for_dropping():
    _, report = validate_rows(dataset({}, {"Response": ""}, {"Response": " "}, {"Question": "q0"}))
    table = report.table()
    assert table["rows"].to_dict() == {"rows read": 4, "Response is empty": 2, "duplicate question": 1, "rows kept": 1}
    assert table.loc["Response is empty", "first"] == "r1"


@pytest.mark.parametrize("texts", [("为什么会发烧？", "为什么会咳嗽？"), ("Чому?", "Як?"), ("ação", "aço")])
def test_questions_in_any_script_are_told_apart_by_their_letters(texts):
    kept, _ = validate_rows(dataset(*({"Question": text} for text in texts)))
    assert len(kept) == 2


# --- split -------------------------------------------------------------------------------------------------------------


def test_the_split_column_decides_and_counts_are_upper_limits():
    rows = dataset(*({"split": split} for split in ["train", "held_out", "train", "test", "train"]))
    train, held_out = split_rows(rows, settings(None, "dataset.num_rows=2", "dataset.held_out_rows=9"), 0)
    assert (train["id"], held_out["id"]) == (["r0", "r2"], ["r1", "r3"])


@pytest.mark.parametrize(
    ("num_rows", "held_out_rows", "for_training", "for_judging"),
    [(3, 2, [0, 1, 2], [3, 4]), ("null", 4, [0, 1], [2, 3, 4, 5]), (9, 5, [0], [1, 2, 3, 4, 5])],
)
def test_held_out_rows_follow_training_rows_by_default(num_rows, held_out_rows, for_training, for_judging):
    chosen = settings(None, f"dataset.num_rows={num_rows}", f"dataset.held_out_rows={held_out_rows}")
    train, held_out = split_rows(dataset(*[{}] * 6), chosen, 0)
    assert train["id"] == [f"r{i}" for i in for_training]
    assert held_out["id"] == [f"r{i}" for i in for_judging]


def test_shuffling_depends_on_the_seed_and_keeps_the_sides_apart():
    rows, chosen = dataset(*[{}] * 30), settings(None, "dataset.shuffle=true", "dataset.num_rows=20", "dataset.held_out_rows=10")
    (one, held_out), (again, _), (other, _) = (split_rows(rows, chosen, seed) for seed in (1, 1, 2))
    assert one["id"] == again["id"] != other["id"]
    assert sorted([*one["id"], *held_out["id"]]) == sorted(rows["id"])


def test_a_split_with_an_empty_side_is_refused():
    with pytest.raises(DataError, match=r"3 usable rows leave \d to train on and \d held out: .*held_out_rows \(3\)"):
        split_rows(dataset(*[{}] * 3), settings(None, "dataset.held_out_rows=3"), 0)


@pytest.mark.parametrize("split", ["train", "Train", "test"])
def test_a_split_column_with_an_empty_side_is_refused(split):
    with pytest.raises(DataError, match=f"column `split` holds {split}: rows to train on must say train"):
        split_rows(dataset(*[{"split": split}] * 3), settings(None, "dataset.held_out_rows=3"), 0)


def test_ids_that_stand_twice_are_replaced(tmp_path):
    rows = [{"id": "same", "Question": f"Question {n}?", "Complex_CoT": "So.", "Response": "Yes."} for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_rows(settings(path))["id"] == ["row-0", "row-1", "row-2"]


# --- repeats and questions ---------------------------------------------------------------------------------------------


def repeat_of(row_id: str | int) -> dict:
    pair = {"train_id": str(row_id), "question_id": "q", "question": "Why?", "train_question": "Why so?"}
    return pair | {"similarity": 100.0, "overlap": 1.0, "exact": True}


def test_repeats_are_dropped_and_nothing_else_is():
    train = dataset({}, {}, {}, {})
    assert drop_repeats(train, [repeat_of("r0"), repeat_of("r2"), repeat_of("r2")])["id"] == ["r1", "r3"]
    assert drop_repeats(train, [])["id"] == train["id"]


def test_repeats_of_rows_whose_ids_are_numbers_are_dropped():
    assert drop_repeats(dataset({"id": 7}, {"id": 8}), [repeat_of(7)])["id"] == [8]


def test_rows_that_all_repeat_a_question_are_refused():
    with pytest.raises(DataError, match="every training row repeats an evaluation question"):
        drop_repeats(dataset({}), [repeat_of("r0")])


def test_the_refusal_of_repeats_shows_the_nearest_pair_and_settings():
    repeats = [repeat_of("r0") | {"similarity": 86.5, "overlap": 0.1}, repeat_of("r0") | {"similarity": 91.2, "overlap": 0.4}]
    expected = (
        r"for example row r0, 'Why so\?', repeats q, 'Why\?' \(similarity 91\.2, 8-word overlap 0\.4\)\. .*"
        r"dataset\.near_repeat_similarity and dataset\.ngram_overlap.*dataset\.repeats=report"
    )
    with pytest.raises(DataError, match=expected) as caught:
        drop_repeats(dataset({}), repeats)
    with pytest.raises(DataError, match=r"for example row-2, 'Why so\?', repeats q"):
        drop_repeats(dataset({"id": "row-2"}), [repeat_of("row-2") | {"similarity": 86.5, "overlap": 0.1}])
    long = repeat_of("r0") | {"question": "Why?\n" * 10_000, "train_question": "So\n" * 10_000}
    with pytest.raises(DataError) as other:
        drop_repeats(dataset({}), [long])
    assert len(str(other.value)) < len(str(caught.value)) + 250 and "\n" not in str(other.value)


def check(path: Path, rows: list[dict], *overrides: str) -> str:
    counts = ["dataset.num_rows=3", "dataset.held_out_rows=2", "evaluation.num_questions=2"]
    return check_data(load_config("smoke", [f"dataset.path={json.dumps(str(write(path, rows)))}", *counts, *overrides]))


UNLIKE = [
    ROWS[0] | {"Question": text} for text in ("Why?", "Which valve leaks?", "Who coughs?", "How much?", "Is pain bad?", "x")
]


def test_rows_left_unused_are_counted_before_the_run(tmp_path):
    line = "3 rows to train on, 2 held out, 2 of them to be asked"
    assert check(tmp_path / "x.jsonl", UNLIKE[:5]) == line
    unused = "; 1 of 6 usable rows are left unused (dataset.num_rows is 3, dataset.held_out_rows 2)"
    assert check(tmp_path / "x.jsonl", UNLIKE) == line + unused


def test_unused_rows_of_a_split_column_name_the_setting(tmp_path):
    marked = [row | {"split": split} for row, split in zip(UNLIKE, ["train", "train", *["test"] * 4], strict=True)]
    said = check(tmp_path / "x.jsonl", marked, "dataset.num_rows=1")
    assert said.endswith("3 of 6 usable rows are left unused (1 marked train: dataset.num_rows is 1; 2 not marked train: "
                         "dataset.held_out_rows is 2)")  # fmt: skip
    said = check(tmp_path / "x.jsonl", marked, "dataset.num_rows=null")
    assert said.endswith("2 of 6 usable rows are left unused (2 not marked train: dataset.held_out_rows is 2)")


def test_fewer_training_rows_than_asked_for_are_said(tmp_path):
    said = check(tmp_path / "x.jsonl", UNLIKE[:4])
    assert said == "2 rows to train on of 3 asked for (dataset.num_rows), 2 held out, 2 of them to be asked"


def test_rows_that_repeat_a_question_are_counted_early(tmp_path):
    alike = UNLIKE[1] | {"Question": "Which valve leaked?"}
    said = check(tmp_path / "x.jsonl", [alike, UNLIKE[0], UNLIKE[2], UNLIKE[1], UNLIKE[3]])
    assert "; 1 of the rows to train on will be left out, since they repeat a held-out question (dataset.repeats)" in said
    assert "repeat" not in check(tmp_path / "x.jsonl", [alike, *UNLIKE[:4]], "dataset.repeats=report")


@pytest.mark.parametrize("most_compared", [1, 100])
def test_rows_that_all_repeat_a_question_are_refused_early(tmp_path, monkeypatch, most_compared):
    monkeypatch.setattr("medcot_utils.data.rows._COMPARED_FIRST", most_compared)
    alike = [ROWS[0] | {"Question": f"Which valve leaks in a man of {i} years?"} for i in range(20, 26)]
    with pytest.raises(DataError, match="every training row repeats an evaluation question"):
        check(tmp_path / "x.jsonl", alike)
    assert check(tmp_path / "x.jsonl", alike, "dataset.repeats=report").startswith("3 rows to train on")
    assert check(tmp_path / "x.jsonl", [*alike[:2], UNLIKE[0], *alike[2:]]).startswith("3 rows to train on")


def test_the_articles_question_is_asked_first_and_unscored():
    asked = choose_questions(dataset({}, {}, {}), 2)
    assert [(one["id"], one["scored"]) for one in asked] == [("article", False), ("r0", True), ("r1", True)]
    assert (asked[0]["Question"], asked[0]["Response"]) == (ARTICLE_QUESTION, ARTICLE_ANSWER)


def test_more_questions_than_held_out_rows_are_refused():
    with pytest.raises(
        DataError, match=r"evaluation\.num_questions is 4, but only 3 rows are held out: .*--set evaluation\.num_questions=3$"
    ):
        choose_questions(dataset({}, {}, {}), 4)
