"""Read the letter that a completion answers with, in exactly the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from medcot_utils.data.prompts import parse_completion

_ASKED_LINE = re.compile(r"\s*answer\s*:(.*)", re.IGNORECASE)
_LETTER = re.compile(r"\s*\(?([a-z])\b(.*)", re.IGNORECASE)
_MARKUP = re.compile(r"[*_`#]")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # ASCII as Chinese and Japanese keyboards type it


def read_answer(completion: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a completion answers with. Return None if no letter can be read: then the model abstained.

    This reads only the last line after the single `</think>` that begins with `Answer:`; case, Markdown emphasis, and width of
    characters do not matter. An option's letter must follow the colon, alone or in brackets, and then nothing or that option's
    own text: "B or C" and "C. difficile" do not count. No letter is read if the thinking was never closed, was closed twice, or
    resumes after the answer, if the wording is different, or if no option has the letter.

    HuatuoGPT-o1's scorer, which most published numbers come from, counts first and last letters and reports the better total;
    without a letter, it chooses the most similar option. This function has one reading, fixed before the result is known."""
    answer = completion.partition("</think>")[2].translate(_FULL_WIDTH)
    if parse_completion(completion).closed != 1 or "<think>" in answer:
        return None
    lines = [found[1] for line in answer.splitlines() if (found := _ASKED_LINE.fullmatch(_MARKUP.sub("", line)))]
    found = _LETTER.fullmatch(lines[-1]) if lines else None
    if not found or found[1].upper() not in options:
        return None
    letter, rest = found[1].upper(), _bare(found[2])
    return letter if rest in ("", _bare(options[letter])) else None


def _bare(text: str) -> str:
    return " ".join(_MARKUP.sub("", text.translate(_FULL_WIDTH)).casefold().split()).strip(" .,:;()-。、")
