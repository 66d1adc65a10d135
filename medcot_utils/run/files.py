"""Files written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.paths import place_beside

if TYPE_CHECKING:
    from datasets import Dataset

_HASHED_AT_ONCE = 4


def sha256_of(path: Path) -> tuple[str, int]:
    """Return the sha256 (hex) and the bytes of a file; of a folder, over its files' relative names and hashes in sorted order."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size
    digest, total = hashlib.sha256(), 0
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file, (one, size) in zip(files, sha256_of_each(files), strict=True):
        digest.update(f"{file.relative_to(path).as_posix()}\0{one}\n".encode())
        total += size
    return digest.hexdigest(), total


def sha256_of_each(files: Sequence[Path]) -> list[tuple[str, int]]:
    """Return what `sha256_of` returns for each file. Files are read at the same time: one processor hashes about 1 GB/s."""
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return list(pool.map(sha256_of, files))


def fsync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Write beside, fsync and rename, so that a reader sees the old file or the new one, never a part.

    Raises DiskError on a full disk."""
    with full_disk_told(path.name, path.parent):
        beside = write_beside(path, text)
        beside.replace(path)
        fsync(path.parent)


def write_beside(path: Path, text: str) -> Path:
    """Write a text beside `path`, on disk before this returns; return the path to rename."""
    beside = place_beside(path)
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return beside


def to_json(value: Any) -> str:
    """Return JSON text as the files of a run hold it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def fill(path: Path, value: Any, suffix: str) -> None:
    """Write a value in the form that the suffix says, as `Run.write` takes it; a folder has none."""
    if callable(value):
        if not suffix:
            path.mkdir()
        value(path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in value), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(to_json(value), encoding="utf-8")
    elif suffix == ".parquet":
        value.to_parquet(str(path))
    else:
        path.write_text(value, encoding="utf-8")


def read_rows(path: Path) -> Dataset:
    """Return the rows of a Parquet file. Raises OSError or ValueError if it cannot be read."""
    # Not from_parquet: its cache is keyed by path, and would return an older file of the same name.
    import pyarrow.parquet as pq
    from datasets import Dataset

    return Dataset(pq.read_table(path))


def take_the_place(beside: Path, final: Path) -> None:
    """Rename `beside` to `final`, in place of the file or folder of that name."""
    old = None
    if final.is_dir():  # a folder cannot be renamed over: move the old one aside first
        old = place_beside(final, "old")
        remove(old)
        final.rename(old)
    beside.replace(final)
    if old:
        remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
