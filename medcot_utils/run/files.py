"""Files written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.paths import place_beside

if TYPE_CHECKING:
    from datasets import Dataset


def sha256_of(path: Path) -> tuple[str, int]:
    """Return the sha256 (hex) and the bytes of a file; of a folder, over its files' relative names and hashes in sorted order."""
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest(), path.stat().st_size
    digest, total = hashlib.sha256(), 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        one, size = sha256_of(file)
        digest.update(f"{file.relative_to(path).as_posix()}\0{one}\n".encode())
        total += size
    return digest.hexdigest(), total


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
