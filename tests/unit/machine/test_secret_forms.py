"""A known secret found in a text in every form that encoding, escaping and printing give it."""

from __future__ import annotations

import base64
import html
import json
import re
from urllib.parse import quote, quote_plus

import pytest

from medcot_utils.machine.secret_forms import begun_at_end, find_known
from medcot_utils.token_shapes import cover

TOKEN = "hf_" + "aB3xQ9" * 6
ODD = "~?>pass&wörd/<1> +\"2'\\"

FORMS = {
    "as it is": lambda secret: secret,
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 after one byte": lambda secret: base64.b64encode(b":" + secret.encode()).decode(),
    "base64 after two bytes": lambda secret: base64.b64encode(b"u:" + secret.encode() + b"more").decode(),
    "base64 for addresses": lambda secret: base64.urlsafe_b64encode(b"\xff\xff:" + secret.encode()).decode(),
    "base64 in lines": lambda secret: base64.encodebytes(
        b"somebody with a name as long as the first line:" + secret.encode()
    ).decode(),
    "base64 in lines, repr": lambda secret: repr(base64.encodebytes(b"x" * 40 + secret.encode())),
    "hex": lambda secret: secret.encode().hex(),
    "hex, upper case": lambda secret: secret.encode().hex().upper(),
    "hex with colons": lambda secret: secret.encode().hex(":"),
    "hex in repr": lambda secret: "".join(rf"\x{byte:02x}" for byte in secret.encode()),
    "every byte percent-encoded": lambda secret: "".join(f"%{byte:02X}" for byte in secret.encode()),
    "URL": lambda secret: quote(secret),
    "URL, slashes too": lambda secret: quote(secret, safe=""),
    "URL, lower case": lambda secret: re.sub("%..", lambda code: code[0].lower(), quote(secret, safe="")),
    "form": lambda secret: quote_plus(secret),
    "HTML": lambda secret: html.escape(secret),
    "JSON": lambda secret: json.dumps(secret),
    "repr": lambda secret: repr(secret),
    "lines": lambda secret: secret[:9] + "\n  " + secret[9:],
    "every character apart": lambda secret: "\n".join(secret),
    "colors": lambda secret: f"\x1b[1m{secret[:5]}\x1b[0m\x1b[36m{secret[5:]}\x1b[0m",
}


@pytest.mark.parametrize("secret", [TOKEN, ODD, "0123456789abcdef" * 2 + "01234567"])
@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_found_in_every_form(form, secret):
    text = f"before {FORMS[form](secret)} after"
    (left,) = cover([text], find_known(text, [secret]))
    assert left.startswith("before ") and left.endswith(" after") and "**********" in left
    assert FORMS[form](secret)[-16:-8] not in left


@pytest.mark.parametrize("offset", range(3))
def test_what_is_left_of_base64_does_not_give_the_secret(offset):
    text = base64.b64encode(b"p" * offset + TOKEN.encode() + b"s" * offset).decode()
    (left,) = cover([text], find_known(text, [TOKEN]))
    assert len(left.replace("*", "").rstrip("=")) <= 2 * offset + 3


def test_a_common_word_is_hidden_only_where_it_stands_alone():
    text = "training the retraining of a trainings plan, pretraining_training=training"
    (left,) = cover([text], find_known(text, ["training"]))
    assert left == "********** the retraining of a trainings plan, pretraining_**********=**********"
    coded = base64.b64encode(b"user:training").decode()
    assert cover([coded], find_known(coded, ["training"])) != [coded]


def test_a_short_secret_is_no_key_and_hides_nothing():
    assert find_known("a short text, and e", ["a", "short", "e", "1234567", ""]) == []
    assert find_known("a b c d e in words abcde", ["a b c d e"]) == [], "nor without its blanks"


def test_a_secret_that_is_no_utf_8_is_found():
    secret = b"pass\xffword1".decode("utf-8", "surrogateescape")
    assert find_known(f"x {secret}", [secret]) == [(2, 2 + len(secret))]
    assert find_known(b"pass\xffword1".hex(), [secret]) == [(0, 20)]


def test_other_text_is_left_alone():
    text = "Two rows of 0.1234, 0x68665f, aGVsbG8gd29ybGQ= and hf_aB3x in a C:\\new\\folder\n\n" * 50
    assert find_known(text, [TOKEN, ODD]) == []


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("nothing", 0),
        ("a token " + TOKEN[:-1], len(TOKEN) - 1),
        ("with h", 1),
        (TOKEN, 0),
        (TOKEN.encode().hex()[:9], 9),
    ],
)
def test_the_beginning_of_a_secret_at_the_end_is_measured(text, length):
    assert begun_at_end(text, [TOKEN]) == length
