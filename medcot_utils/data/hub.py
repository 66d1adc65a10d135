"""Keep a data set on the Hub from running code where it is loaded."""

from __future__ import annotations

from typing import Any


def refuse_references() -> None:
    """Make fsspec raise ValueError for its protocol `reference`, for the rest of this process.

    A data set's README may name its files by any protocol of fsspec, and before 2026.6.0 (CVE-2026-104851) this one renders a
    file's templates without a sandbox. datasets 4 needs 2026.2.0 or older."""
    from fsspec import AbstractFileSystem, register_implementation

    class Refused(AbstractFileSystem):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise ValueError(
                "its README names files by fsspec's protocol `reference`, which could run code: medcot does not read them"
            )

    register_implementation("reference", Refused, clobber=True)
