"""Words of texts in any script, and the language that a script gives away."""

from __future__ import annotations

from collections.abc import Iterable

import regex

# Scripts without spaces between words: Chinese and Japanese, and by Unicode's line-breaking class SA (Standard Annex 14)
# Thai, Lao, Khmer, Burmese and their neighbors.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{lb=SA}"
_CHARACTER = regex.compile(f"[{_UNSPACED}]")
_PART = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}]+")
# Scripts that are written in one language almost alone. Latin, Cyrillic and Arabic letters say nothing of the language.
_SCRIPTS = {
    "ja": r"\p{Hiragana}\p{Katakana}\p{Han}",
    "zh": r"\p{Han}",
    "ko": r"\p{Hangul}",
    "th": r"\p{Thai}",
    "el": r"\p{Greek}",
    "he": r"\p{Hebrew}",
}
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_FEWEST_KANA = 0.1  # share of a Japanese text's letters; a Chinese text has next to none


def counts_characters(text: str) -> bool:
    """Return whether some of a text's words are counted by their characters (see `split_words`)."""
    return not text.isascii() and _CHARACTER.search(text) is not None


def split_words(text: str) -> list[str]:
    """Return the words of a text: what white space parts.

    In a script without spaces between words each character is one, and punctuation between them is none."""
    if not counts_characters(text):
        return text.split()
    words = []
    for piece in text.split():
        parts = _PART.findall(piece) if _CHARACTER.search(piece) else [piece]
        words += [part for part in parts if len(parts) == 1 or any(map(str.isalnum, part))]
    return words


def find_pieces(text: str) -> list[tuple[int, int]]:
    """Return where the pieces of a text begin and end: its words and, between characters without spaces, its punctuation."""
    return [piece.span() for piece in _PART.finditer(text)]


def guess_language(texts: Iterable[str]) -> str | None:
    """Return the language code of texts whose script says it (zh, ja, ko, th, el, he), or None, as for all Latin letters."""
    letters = "".join(regex.findall(r"\p{L}+", " ".join(texts)))
    for code, script in _SCRIPTS.items():
        if code == "ja" and len(_KANA.findall(letters)) < _FEWEST_KANA * len(letters):
            continue
        if len(regex.findall(f"[{script}]", letters)) > len(letters) / 2:
            return code
    return None
