"""Keep a data set on the Hub from running code where it is loaded, and from bringing files of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medcot_utils.errors import quote


def find_files(name: str, subset: str | None = None, revision: str | None = None) -> list[str]:
    """Return the URLs of a data set's files on the Hub; none without a connection, when earlier downloads are used.

    Raises ValueError if its README names files that are neither on the Hub nor in the data set's folder, and what
    `datasets.load_dataset_builder` raises."""
    from datasets import load_dataset_builder

    _refuse_references()
    given = load_dataset_builder(name, subset, revision=revision).config.data_files or {}
    urls = [url for split in given.values() for url in split]
    if outside := [url for url in urls if not url.startswith(("hf://", f"{Path(name).resolve()}/"))]:
        raise ValueError(f"its README names {quote(outside[0])}, which is not on the Hub: medcot does not read it")
    return urls


def _refuse_references() -> None:
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
