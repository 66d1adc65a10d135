"""An error of ours is one line, whatever it quotes."""

from __future__ import annotations

import pytest

from medcot_utils.errors import MedcotError, quote


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a column holds 'x\r\n  y\u2028z'", "a column holds 'x y z'"),
        ("\x00nan \x1b[31m red", r"\x00nan \x1b[31m red"),
        ("患者 café  C:\\data", "患者 café  C:\\data"),
    ],
)
def test_an_error_is_one_line_of_printable_characters(message, line):
    assert str(MedcotError(message)) == line


def test_a_quoted_value_shows_its_beginning_and_its_end():
    assert quote("short") == "'short'"
    assert quote("a" * 50_000 + "b") == f"'{'a' * 39} ... {'a' * 38}b'"
