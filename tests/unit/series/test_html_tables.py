"""Tables of notebooks: texts stand to the left, numbers to the right, no interval is broken, nothing runs off the page."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from medcot_utils.series.html_tables import lay_out
from medcot_utils.series.notebook import wrap_texts

LONG = "no difference shown with 24 questions"
FRAME = pd.DataFrame(
    {
        "verdict": ["fell, better", LONG, ""],
        "loss": [3.99, 3.18, None],
        "interval": ["3.99 [3.88, 4.10]", "at least 5 [-4, 6]", "48 % [45 %, 52 %]"],
        "mixed": ["0.2", "none read", "3"],
        "setting": [True, None, "auto"],
    },
    index=pd.Index(["a", "b", "c"], name="metric"),
)


def aligned(page):
    """The rows of a table, each cell as its text and `left` or `right`."""
    rows = re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    cell = re.compile(r'<t[hd][^>]* style="text-align: (left|right)[^>]*>(.*?)</t[hd]>', re.DOTALL)
    return [[(text.replace("&nbsp;", "").replace("\xa0", " ").strip(), side) for side, text in cell.findall(row)] for row in rows]


@pytest.mark.parametrize("make", [lambda frame: frame, wrap_texts], ids=["a frame", "long texts"])
def test_texts_stand_to_the_left_and_numbers_to_the_right(make):
    head, names, *rows = aligned(lay_out(make(FRAME)._repr_html_()))
    sides = ["left", "right", "right", "left", "left"]
    assert head[1:] == list(zip(FRAME.columns, sides, strict=True)) and names[0] == ("metric", "left")
    assert [[side for _, side in row] for row in rows] == [["left", *sides]] * 3
    assert [row[0][0] for row in rows] == ["a", "b", "c"]


def test_an_index_of_numbers_stands_to_the_right():
    rows = aligned(lay_out(pd.DataFrame({"loss": [2.5]}, index=pd.Index([10], name="step"))._repr_html_()))
    assert rows[-1] == [("10", "right"), ("2.5", "right")]


@pytest.mark.parametrize("make", [lambda frame: frame, wrap_texts], ids=["a frame", "long texts"])
def test_columns_and_rows_in_groups_are_aligned_too(make):
    columns = pd.MultiIndex.from_product([["as they answer", "forced"], ["base", "verdict"]])
    index = pd.MultiIndex.from_tuples([("shipped", "strict"), ("shipped", "letter")], names=["task", "reading"])
    frame = pd.DataFrame([[0.5, "fell", 1.5, "rose"]] * 2, columns=columns, index=index)
    groups, heads, names, first, second = aligned(lay_out(make(frame)._repr_html_()))
    sides = ["right", "left"] * 2
    assert [cell for cell in groups if cell[0]] == [("as they answer", "left"), ("forced", "left")]
    assert [side for _, side in heads[-4:]] == sides
    assert names[:2] == [("task", "left"), ("reading", "left")]
    assert [side for _, side in first] == ["left", "left", *sides], "two cells of the index"
    assert [side for _, side in second] == ["left", *sides], "the first index cell spans both rows"


def test_no_interval_of_a_table_can_end_a_line():
    page = lay_out(FRAME._repr_html_())
    assert "[3.88,\xa04.10]" in page and "[45\xa0%,\xa052\xa0%]" in page and "fell, better" in page


def test_a_wide_table_scrolls_in_a_box_of_its_own():
    page = lay_out(FRAME._repr_html_())
    assert page.startswith('<div style="max-width: 100%; overflow-x: auto">') and page.endswith("</div>")


def test_a_long_text_gets_more_than_a_word_a_line():
    page = lay_out(FRAME._repr_html_())
    assert re.findall(r"min-width[^>]*>([^<]*)<", page) == [LONG]


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame(columns=["a"]), pd.DataFrame(index=["a"])])
def test_a_table_without_a_cell_is_shown(frame):
    assert "<table" in lay_out(frame._repr_html_())


def test_a_table_that_pandas_shortens_keeps_its_sides():
    frame = pd.DataFrame({"n": range(100), "text": ["a"] * 100})
    rows = aligned(lay_out(frame._repr_html_()))
    assert "..." in [text for row in rows for text, _ in row]
    assert [side for _, side in rows[1]] == ["right", "right", "left"]
