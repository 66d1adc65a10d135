"""The forms in which a secret may stand in a text: as it is, escaped, encoded, and with line ends or colors in it."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, quote_plus

from medcot_utils.token_shapes import Span

SHORTEST_SECRET = 8  # anything shorter is no key, and may be part of a word

_MARK = r"\\n|\x1b\[[0-9;]*[A-Za-z]"  # a line end as `repr` writes it, a color
_GAP = rf"(?:\s|{_MARK})*"
_HEX_GAP, _HEX_MARKS = r"(?:\s|\\x|[%:,-])*", b" \t\r\n%:,-\\x"
_MARKS = re.compile(_MARK)
_WORD = re.compile(r"[A-Za-z]{1,19}|[0-9]{1,19}")  # no service gives out such a key


@dataclass(frozen=True)
class _Form:
    """One form of a secret, without the gaps that printing may put into it.

    is_word: it is a secret only where it stands alone; else a secret `training` would be found in `retraining`."""

    text: str
    is_hex: bool = False
    is_word: bool = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        if self.is_word:
            return re.compile(rf"(?<![A-Za-z0-9]){self.text}(?![A-Za-z0-9])")
        if self.is_hex:
            return re.compile(_HEX_GAP.join(re.findall("..", self.text)), re.IGNORECASE)
        return re.compile(_GAP.join(map(re.escape, self.text)))


@functools.lru_cache(maxsize=1000)
def _forms(secret: str) -> tuple[_Form, ...]:
    if _WORD.fullmatch(secret):
        written, first = set(), [_Form(secret, is_word=True)]
    else:
        written, first = {secret, html.escape(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}, []
    content = secret.encode("utf-8", "surrogateescape")  # as os.environ reads what is no UTF-8
    for text in (quote(content, safe=""), quote(content), quote_plus(content)):
        written |= {text, re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), text)} - {secret}
    for before in range(3):  # bytes before it, which shift it within base64's groups of three
        coded = base64.b64encode(bytes(before) + content).decode()
        whole = coded[-(-8 * before // 6) : 8 * (before + len(content)) // 6]  # the characters that it alone decides
        written |= {whole, whole.translate(str.maketrans("+/", "-_"))}
    flat = {"".join(_MARKS.sub("", text).split()) for text in written}
    longer = [_Form(text) for text in sorted(flat) if len(text) >= SHORTEST_SECRET]
    return (*first, *longer, _Form(content.hex(), is_hex=True))


def find_known(text: str, secrets: Iterable[str]) -> list[Span]:
    """Return where these secrets stand in a text, in any form, in no order. Those shorter than SHORTEST_SECRET are not
    looked for.

    A text is first searched without its gaps, in the speed of `in`; only what is found there is located by pattern."""
    found: list[Span] = []
    if len(text) < SHORTEST_SECRET:
        return found
    flat, digits = (
        "".join(text.split()),
        text.encode("utf-8", "surrogatepass").translate(None, _HEX_MARKS).lower().decode("latin-1"),
    )
    if "\\n" in text or "\x1b" in text:
        flat += "\0" + "".join(_MARKS.sub("", text).split())
    for secret in secrets:
        for form in _forms(secret) if len(secret) >= SHORTEST_SECRET else ():
            if form.text in (digits if form.is_hex else flat):
                found += [match.span() for match in form.pattern.finditer(text)]
    return found


def begun_at_end(text: str, secrets: Iterable[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a secret, in any form."""
    most = 0
    for form in (form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in _forms(secret)):
        for length in range(min(len(form.text) - 1, len(text)), most, -1):
            if text.endswith(form.text[:length]):
                most = length
                break
    return most
