"""Text and JSON as other programs write them: with a byte-order mark, in UTF-16, nested too deep, or too large.

Standard library only: a Kaggle session reads with it before the pinned stack is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# A run's own manifest and configuration have some 10 kB.
MAX_RECORD_BYTES = 10_000_000


def decode(content: bytes) -> str:
    """Return UTF-8 text without its byte-order mark. Raises ValueError for another encoding, and names UTF-16 and UTF-32."""
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise ValueError(f"the text is in {encoding.upper()}: save it as UTF-8")
    return content.decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for one that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deep") from None


def read_json(path: Path) -> Any:
    """Return the value of a small JSON file. Raises OSError or ValueError if it cannot be read or is larger than
    MAX_RECORD_BYTES."""
    with path.open("rb") as stream:
        return parse_json(decode(read_at_most(stream, MAX_RECORD_BYTES)))


def read_at_most(stream: Any, most: int) -> bytes:
    """Return all that a binary stream holds. Raises ValueError if that is more than `most` bytes, after reading so many."""
    content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most / 1e6:g} MB (MAX_RECORD_BYTES)")
    return content
