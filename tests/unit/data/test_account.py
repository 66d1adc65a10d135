"""Where the rows went: every row that was read is accounted for, with the setting or fault that decided."""

from __future__ import annotations

import pytest

from medcot_utils import data
from medcot_utils.config import load_config

REPEATS = [{"train_id": "row-3", "question_id": q} for q in ("row-8", "row-9")]  # one row that repeats two questions
REPORT = {
    "rows_read": 12,
    "dropped": {"duplicate question": 1, "Response is empty": 1},
    "repeats": REPEATS,
    "repeats_dropped": True,
    "overlong_dropped": 1,
    "checks": {"rows": 4},
    "held_out": 2,
    "held_out_overlong": 1,
}
TOO_LONG = "model.max_seq_length is 1024, dataset.overlong is drop"


def config(*overrides):
    return load_config("smoke", ["dataset.num_rows=5", "dataset.held_out_rows=3", *overrides])


def test_every_row_that_was_read_is_in_one_line_of_the_table():
    table = data.tabulate_uses(REPORT, config())
    sizes = "dataset.num_rows is 5, dataset.held_out_rows 3"
    assert list(table.itertuples(name=None)) == [
        ("read", 12, ""),
        ("left out", 1, "duplicate question"),
        ("left out", 1, "Response is empty"),
        ("left unused", 1, sizes),
        ("left out of the held-out rows", 1, TOO_LONG),
        ("held out", 2, "dataset.held_out_rows is 3"),
        ("left out", 1, "they repeat a held-out question, dataset.repeats is drop"),
        ("left out", 1, TOO_LONG),
        ("trained on", 4, ""),
    ]
    assert table["rows"][1:].sum() == table["rows"].iloc[0]


def test_one_line_says_how_many_rows_are_trained_on_and_why():
    line = data.describe_uses(REPORT, config())
    assert line.startswith("trains on 4 of 12 rows (5 asked for with dataset.num_rows); 1 left out (duplicate question); ")
    assert "; 2 held out (dataset.held_out_rows is 3); " in line
    whole = {"rows_read": 4, "dropped": {}, "overlong_dropped": 0, "repeats": [], "held_out": 0, "held_out_overlong": 0}
    assert data.describe_uses(REPORT | whole, config("dataset.num_rows=4")) == "trains on 4 of 4 rows"


def test_repeats_that_are_only_reported_are_trained_on():
    report = REPORT | {"repeats_dropped": False, "checks": {"rows": 5}}
    assert "repeat" not in data.describe_uses(report, config("dataset.repeats=report"))


def test_a_report_of_an_earlier_version_is_accounted_for_too():
    earlier = {key: value for key, value in REPORT.items() if not key.startswith("held_out")}
    uses = data.list_uses(earlier, config())
    assert {"what": "held out or left unused", "rows": 4, "why": "dataset.num_rows is 5, dataset.held_out_rows 3"} in uses
    assert sum(use["rows"] for use in uses) == 12


@pytest.mark.parametrize("given", ["dataset.num_rows=null", "dataset.num_rows="])
def test_rows_are_not_left_unused_for_a_number_that_is_not_set(given):
    line = data.describe_uses(REPORT, config(given))
    assert "left unused (not marked train, dataset.held_out_rows is 3)" in line and "num_rows" not in line
