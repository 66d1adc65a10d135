"""One process at a time changes a run directory: its lock, and who holds it."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import psutil
from filelock import FileLock, Timeout

from medcot_utils.errors import MedcotError
from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.names import refuse_links_out
from medcot_utils.machine.paths import display_path, host_name

LOCK, HOLDER = ".lock", ".lock.json"
# What a file system answers that has no locks, as some network mounts have none: then nobody can be kept out.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

_locks: dict[Path, FileLock] = {}  # of this process, by run directory
_kept: set[Path] = set()


class RunError(MedcotError):
    """The run directory or one of its artifacts cannot be used; the message names it and the notebook to run."""


class Holder(TypedDict):
    """Who holds the lock, as `.lock.json` says while it is held."""

    work: str  # `medcot run`, `notebook 05_training`, ...
    host: str
    pid: int
    since: str  # local time


@contextmanager
def hold(folder: Path, work: str) -> Iterator[None]:
    """Hold the lock of a run directory that exists. A process may hold it several times over, and what a parent process
    holds its children have too: the kernels of `medcot run`.

    Raises RunError, before anything is written, if another process holds it or the folder cannot be written, and OutsideError
    for a link out of it."""
    taken = _take(folder.resolve(), work)
    try:
        yield
    finally:
        if taken:
            _release(folder.resolve())


def keep(folder: Path, work: str) -> None:
    """Hold the lock of a run directory until `let_go`, or until this process ends. Raises RunError as `hold` does."""
    folder = folder.resolve()
    if folder not in _kept and _take(folder, work):
        _kept.add(folder)


def let_go(folder: Path | None = None) -> None:
    """Release what `keep` holds, of one run directory or of all; without effect on one that is not kept."""
    for kept in _kept & {folder.resolve()} if folder else set(_kept):
        _kept.discard(kept)
        _release(kept)


def _take(folder: Path, work: str) -> bool:
    """Return whether this process holds the lock now; False if a parent does, or the file system has no locks."""
    lock = _locks.setdefault(folder, FileLock(folder / LOCK, timeout=0, thread_local=False))
    before = lock.is_locked
    if not before:
        refuse_links_out(folder)  # before the first byte is written through one
    try:
        lock.acquire()
    except Timeout:
        holder = _read_holder(folder)
        if holder and holder["host"] == host_name() and holder["pid"] in {p.pid for p in psutil.Process().parents()}:
            return False
        raise RunError(_busy(folder, holder)) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise cannot_be_written(folder, error) from error
    if not before:
        holder = Holder(work=work, host=host_name(), pid=os.getpid(), since=time.strftime("%Y-%m-%d %H:%M:%S"))
        try:
            with full_disk_told(HOLDER, folder):
                (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
        except BaseException:
            lock.release()
            raise
    return True


def _release(folder: Path) -> None:
    lock = _locks[folder]
    if lock.lock_counter == 1:
        (folder / HOLDER).unlink(missing_ok=True)
    lock.release()


def _read_holder(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / HOLDER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # of an earlier version, or just being written
        return None


def _busy(folder: Path, holder: Holder | None) -> str:
    what = "wait until it ends, or use another run directory (medcot run --run-dir, in a notebook RUN_DIR)"
    if holder is None:
        return f"another medcot run is working in {display_path(folder)}/: {what}"
    who = f"{holder['work']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    kernel = ". A notebook opened by hand ends with its last cell, or when its kernel is restarted" * ("notebook" in who)
    return f"{who} is working in {display_path(folder)}/: {what}{kernel}"


def is_held(folder: Path) -> bool:
    """Return whether any process holds the lock of a run directory; changes nothing, so that a reader may ask."""
    import fcntl

    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # never locked, or not ours to read
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(handle)


def cannot_be_written(folder: Path, error: OSError) -> RunError:
    """Return the error for a run directory that cannot be made or written."""
    return RunError(f"run directory {folder} cannot be written ({error.strerror}): choose another with --run-dir")
