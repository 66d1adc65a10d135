"""Tokens known by their look: what is taken for one, what is not, and how one is covered."""

from __future__ import annotations

import pytest

from medcot_utils.errors import MedcotError, quote
from medcot_utils.token_shapes import STARS, cover, find_by_look, hide_by_look, name_look

# {what it looks like: made-up tokens of today's lengths}
TOKENS = {
    "a Hugging Face token": ["hf_" + "aB" * 17],
    "a Kaggle token": ["KGAT_" + "0a" * 16],
    "an Anthropic API key (sk-ant-...)": ["sk-ant-api03-" + "aB-_1" * 18 + "abcAA", "sk-ant-admin01-" + "aB1" * 31 + "AA"],
    "a secret API key (sk-...)": ["sk-" + "aB1" * 16, "sk-proj-" + "aB_-" * 30, "sk-or-v1-" + "0a" * 32],
    "a GitHub token": [*(f"gh{kind}_" + "aB1" * 12 for kind in "pousr"), "github_pat_" + "aB1" * 7 + "A_" + "aB1" * 19],
    "an AWS key": ["AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"],
    "a Weights & Biases key": ["wandb_v1_" + "aB3" * 11],
}
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(("look", "token"), [(look, token) for look, tokens in TOKENS.items() for token in tokens])
def test_a_token_is_named_by_its_look_and_hidden(look, token):
    text = f'{{"key": "{token}", "other": 1}}'
    assert name_look(text) == look
    assert hide_by_look(text) == f'{{"key": "{STARS}", "other": 1}}'


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download_and_the_rest_of_a_long_name",
        "sk-toggleable__content-arrow sk-estimator-doc-link",  # what scikit-learn writes
        "disk-0123456789abcdef0123 task-abcdefghijklmnopqrstuvw",
        "the revision 736e4a6391593d33a1f019f23bc23f91cf56b830",
        "runs/ann/wandb/artifacts/736e4a6391593d33a1f019f23bc23f91cf56b830/rows.jsonl",
        f"{AWS_SECRET} alone",
        "MAKIAIOSFODNN7EXAMPLE AKIAIOSFODNN7EXAMPLES",
        "ghp_short github_pattern_matching_is_a_long_name",
    ],
)
def test_names_and_digests_are_no_tokens(text):
    assert name_look(text) is None and hide_by_look(text) == text


def test_the_secret_beside_an_aws_key_is_hidden_too():
    text = f"aws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {AWS_SECRET}\n"
    assert hide_by_look(text) == f"aws_access_key_id = {STARS}\naws_secret_access_key = {STARS}\n"
    assert hide_by_look(f"{AWS_SECRET}:ASIAIOSFODNN7EXAMPLE") == f"{STARS}:{STARS}"
    assert AWS_SECRET in hide_by_look("AKIAIOSFODNN7EXAMPLE" + " " * 1000 + AWS_SECRET)


def test_only_the_key_is_hidden_not_the_word_before_it():
    assert hide_by_look("wandb login " + "0123456789" * 4 + "\n") == f"wandb login {STARS}\n"
    assert hide_by_look("WANDB_API_KEY=" + "0123456789" * 4) == f"WANDB_API_KEY={STARS}"


@pytest.mark.parametrize(
    ("pieces", "spans", "covered"),
    [
        (["abc", "def"], [], ["abc", "def"]),
        (["abc", "def"], [(2, 4)], [f"ab{STARS}", "ef"]),
        (["abc", "def", "ghi"], [(1, 8)], [f"a{STARS}", "", "i"]),
        (["abcdef"], [(0, 2), (2, 4)], [f"{STARS}{STARS}ef"]),
        (["abcdef"], [(3, 5), (0, 4)], [f"{STARS}f"]),
        (["", "ab", ""], [(0, 2)], ["", STARS, ""]),
    ],
)
def test_a_span_is_covered_across_pieces(pieces, spans, covered):
    assert cover(pieces, spans) == covered


def test_errors_and_what_they_quote_hold_no_token():
    token = TOKENS["a Hugging Face token"][0]
    assert str(MedcotError(f"no such name: {token}")) == f"no such name: {STARS}"
    assert quote("a" * 30 + token + "-" * 60) == f"'{'a' * 30}{STARS[:9]} ... {'-' * 39}'", "hidden before it is cut"
    assert find_by_look("") == []
