"""Texts of other people, shown as they are: in a terminal, in one line, in Markdown, beside formulas."""

from __future__ import annotations

import sys

import pytest
from markdown_it import MarkdownIt
from planted_texts import PAYLOADS, shown

from medcot_utils.plain_text import escape_markdown, hide_formulas, keep_intervals, one_line, say, show_controls


@pytest.mark.parametrize("name", PAYLOADS)
def test_control_characters_are_written_out_and_no_other(name):
    text, seen = PAYLOADS[name]
    assert show_controls(text) == (seen or text)


@pytest.mark.parametrize("text", ["BP <90", "a\tb\nc", "患者　café", "naïve\u200dé", "مرحبا \u200f!", "👩\u200d⚕️"])
def test_what_people_write_stays_as_it_is(text):
    assert show_controls(text) == text


@pytest.mark.parametrize(
    ("text", "seen"), [("a\r\nb\rc", "a\nb\nc"), ("\ud800", r"\ud800"), ("over\b\b\bwritten", r"over\x08\x08\x08written")]
)
def test_nothing_overwrites_what_stands_before_it(text, seen):
    assert show_controls(text) == seen


def test_a_text_within_a_line_makes_no_second_line():
    assert one_line("a run\r\n  verified: all\x85of it\u2028\x1b[2K") == r"a run verified: all of it \x1b[2K"


def test_every_line_that_is_said_is_one_line(capsys):
    say("one\ntwo", 3)
    say("\x1b]0;title\x07", stream=sys.stderr)
    assert capsys.readouterr() == ("one two\n3\n", "\\x1b]0;title\\x07\n")


LINES = (
    "# a",
    "- a",
    "+ a",
    "1. a",
    "2) a",
    "> a",
    "=== a",
    "---",
    "    a",
    "[x]: /y",
    "[a](/b)",
    "![a](/b)",
    "a&lt;b",
    "_a_ b_c",
)


@pytest.mark.parametrize("text", [*LINES, *(shown(name) for name in PAYLOADS if name != "formula")])
def test_markdown_shows_a_text_as_it_is(text):
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    seen = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert render(escape_markdown(text)).replace("<span>\\</span>", "\\") == f"<p>{seen}</p>\n"
    assert render(f"- {escape_markdown(text)}").count("<li>") == 1
    table = render(f"| head |\n| --- |\n| {escape_markdown(text)} |\n").replace("<span>\\</span>", "\\")
    assert f"<td>{seen}</td>" in table


def test_numbers_and_names_stay_readable_in_markdown():
    for text in ("-0.42 [-0.50, -0.34]", "1.77 [1.70, 1.84]", "unsloth/my_model-8B", "p = 0.031: better", "0.5 (n = 24)", "12"):
        assert escape_markdown(text) == text


def test_no_dollar_sign_or_backslash_stands_beside_another_character():
    assert hide_formulas(r"<td>$5, \(x\)</td>") == ("<td><span>&#36;</span>5, <span>&#92;</span>(x<span>&#92;</span>)</td>")


@pytest.mark.parametrize("text", ["[-0.1, 0.3]", "[45 %, 52 %]", "[1,234, 2,345]", "[-29.02, 23.62]", "[1e-05, 2e-05]"])
def test_an_interval_has_no_space_that_may_end_a_line(text):
    kept = keep_intervals(f"at least 5 {text} of it")
    assert kept == f"at least 5 {text} of it".replace(text, text.replace(" ", "\N{NO-BREAK SPACE}"))


@pytest.mark.parametrize("text", ["[a, b]", "[1, 2, 3]", "[]", "[see 1, 2]", "1, 2", "[1 and 2]"])
def test_no_other_text_is_taken_for_an_interval(text):
    assert keep_intervals(text) == text
