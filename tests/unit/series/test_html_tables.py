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
    head, *rows = aligned(lay_out(make(FRAME)._repr_html_()))
    sides = ["left", "right", "right", "left", "left"]
    assert head == [("metric", "left"), *zip(FRAME.columns, sides, strict=True)]
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
    groups, heads, first, second = aligned(lay_out(make(frame)._repr_html_()))
    sides = ["right", "left"] * 2
    assert [cell for cell in groups if cell[0]] == [("as they answer", "left"), ("forced", "left")]
    assert [side for _, side in heads[-4:]] == sides
    assert heads[:2] == [("task", "left"), ("reading", "left")], "the index's names share a row with the columns'"
    assert [side for _, side in first] == ["left", "left", *sides], "two cells of the index"
    assert [side for _, side in second] == ["left", *sides], "the first index cell spans both rows"


def test_columns_that_have_a_name_keep_their_row():
    frame = pd.DataFrame({"loss": [2.5]}, index=pd.Index([10], name="step")).rename_axis(columns="metric")
    assert [row[0] for row in aligned(lay_out(frame._repr_html_()))] == [("metric", "left"), ("step", "left"), ("10", "right")]


def test_numbers_with_their_unit_stand_to_the_right():
    sizes = pd.DataFrame({"size": ["538 MB", "1,237 MB", "0.3 GiB"], "time": ["11 s", "4 min (3 to 5)", "2 min"]})
    assert [side for _, side in aligned(lay_out(sizes._repr_html_()))[1][1:]] == ["right", "left"]


def test_no_interval_or_bound_of_a_table_can_end_a_line():
    page = lay_out(FRAME._repr_html_())
    assert "[3.88,\xa04.10]" in page and "[45\xa0%,\xa052\xa0%]" in page and "fell, better" in page
    assert "at\xa0least\xa05 [" in page, "but before its interval"


def style_of(text):
    return re.search(r'<td style="([^"]*)"', lay_out(pd.DataFrame({"a": [text]})._repr_html_()))[1]


def test_a_short_name_is_not_broken_at_its_hyphen():
    assert "white-space: nowrap" in style_of("case-121") and "white-space" not in style_of("4-bit base + adapter")
    assert "white-space" not in style_of("terminating-runs-of-polymorphic")


def test_a_long_word_does_not_widen_a_table():
    assert "overflow-wrap: anywhere" in style_of("6a02" * 16) and "overflow-wrap" not in style_of("afterdepolarisations")
    page = lay_out(pd.DataFrame({"a": [1]}, index=["training.gradient_accumulation_steps"])._repr_html_())
    assert "training.gradient_<wbr>accumulation_<wbr>steps" in page and "<wbr>" not in lay_out(FRAME._repr_html_())


def test_line_breaks_of_a_text_need_no_style_sheet():
    pages = [lay_out(wrap_texts(pd.DataFrame({"base": [text]}))._repr_html_()) for text in ("1. One\n2. Two", "One")]
    assert ["white-space: pre-wrap" in page.rpartition("</style>")[2] for page in pages] == [True, False]


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
