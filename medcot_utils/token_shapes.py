"""Tokens known by their look, whoever holds them: keys with a prefix of their own. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

STARS = "**********"
Span = tuple[int, int]  # where a secret begins and ends in a text

# Prefixes and alphabets as the services document them (and gitleaks lists them), the lengths a little shorter than today's.
# With a group, the secret is the group.
LOOKS_LIKE = {
    "a Hugging Face token": re.compile(r"hf_[A-Za-z0-9]{30,}"),
    "a Kaggle token": re.compile(r"KGAT_[A-Za-z0-9]{16,}"),
    "an Anthropic API key (sk-ant-...)": re.compile(r"sk-ant-[A-Za-z0-9_-]{20,}"),
    "a secret API key (sk-...)": re.compile(
        r"sk-(?<![A-Za-z0-9]sk-)(?:[A-Za-z0-9]{20,}|(?:proj|svcacct|admin|or-v1)-[A-Za-z0-9_-]{20,})"
    ),
    "a GitHub token": re.compile(r"gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,}"),
    "an AWS key": re.compile(r"A[KS]IA(?<![A-Za-z0-9]A[KS]IA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a Weights & Biases key": re.compile(r"[wW](?:andb|ANDB)(?:_v\d_[A-Za-z0-9_]{20,}|[^\n/]{0,40}\b([0-9a-f]{40})\b)"),
}
# The secret half of an AWS key has no prefix. It is one only beside the half that has.
_AWS_SECRET, _BESIDE = re.compile(r"(?<![A-Za-z0-9/+])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"), 300


def name_look(text: str) -> str | None:
    """Return what the first token in a text looks like, as `a Hugging Face token`, or None; never the token."""
    return next((kind for kind, pattern in LOOKS_LIKE.items() if pattern.search(text)), None)


def find_by_look(text: str) -> list[Span]:
    """Return where the tokens of a text are, in no order."""
    found = []
    for kind, pattern in LOOKS_LIKE.items():
        for match in pattern.finditer(text):
            found.append(match.span(match.lastindex or 0))
            if kind == "an AWS key":
                beside = _AWS_SECRET.finditer(text, max(0, match.start() - _BESIDE), match.end() + _BESIDE)
                found += [secret.span() for secret in beside]
    return found


def hide_by_look(text: str) -> str:
    """Return a text without its tokens."""
    return cover([text], find_by_look(text))[0]


def cover(pieces: Sequence[str], spans: Iterable[Span]) -> list[str]:
    """Return consecutive pieces of one text with STARS in place of each span of it. A span may lie across pieces: its stars
    stand where it begins."""
    apart: list[Span] = []
    for begin, end in sorted(spans):
        if apart and begin < apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((begin, end))
    if not apart:
        return list(pieces)
    covered, offset = [], 0
    for piece in pieces:
        kept, reached, after = [], 0, offset + len(piece)
        for begin, end in ((begin - offset, end - offset) for begin, end in apart if begin < after and end > offset):
            kept += [piece[reached : max(begin, reached)], STARS if begin >= 0 else ""]
            reached = end
        covered.append("".join([*kept, piece[reached:]]))
        offset = after
    return covered
