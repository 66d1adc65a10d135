"""The record of each push of a run, in pushed.json: the files that were sent, the Hub's listing, and the downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.errors import MedcotError
from medcot_utils.export.hub.requests import HubError, HubRefusal
from medcot_utils.machine.redaction import redact
from medcot_utils.run.directory import Run
from medcot_utils.run.files import to_json, write_atomic
from medcot_utils.run.shapes import PUSHES, read_records

if TYPE_CHECKING:
    import pandas as pd

RECORD = "pushed.json"


class ListedFile(TypedDict):
    """Hold a file as the Hub lists it. digest: `sha256:` and the sha256 of a large file, or `git:` and the blob id of another."""

    bytes: int
    digest: str


class DeletedFile(ListedFile):
    """Hold weights of an earlier push that the run no longer has."""

    path: str
    artifact: str


class FileRecord(TypedDict):
    """Hold a file of a push. The verification sets `verified` and the fields after it."""

    path: str  # in the repository
    artifact: str  # model card, adapter, merged, or gguf
    bytes: int
    sha256: str
    sent: bool  # whether a commit of this push holds it
    there_already: bool  # whether the repository held the same file before
    replaced: str | None  # the digest of the other file that was there before
    verified: bool | None  # None: not compared yet
    on_the_hub: NotRequired[ListedFile | None]  # None: not there
    downloaded: NotRequired[str]  # whole, or both ends
    fault: NotRequired[str | None]


class RepositoryRecord(TypedDict):
    """Hold one repository of a push."""

    repo_id: str
    url: str
    private: bool
    revision: str | None  # the commit that was compared
    commits: dict[str, str]  # {artifact: its commit, or `there already`}
    tag_commit: str | None  # the commit of the tag
    files: list[FileRecord]
    deleted: list[DeletedFile]


class PushRecord(TypedDict):
    """Hold one push of a run."""

    started: str  # ISO 8601, UTC
    state: str  # running, pushed, or failed
    repo_id: str
    layout: str
    endpoint: str
    tag: str | None
    verify_all: bool
    repositories: list[RepositoryRecord]
    ended: NotRequired[str]
    error: NotRequired[str]  # of a failed push


Pushes = list[PushRecord]


def read_record(run: Run) -> list[PushRecord]:
    """Return every push of the run, oldest first. Raises RunError if medcot cannot have written the file."""
    path = run.path / RECORD
    return read_records(path.read_bytes(), run.display(path), PUSHES) if path.exists() else []


def save_record(run: Run, record: PushRecord) -> None:
    """Write the record into the run. It replaces an earlier record of the same push."""
    others = [push for push in read_record(run) if push["started"] != record["started"]]
    write_atomic(run.path / RECORD, to_json([*others, record]))


@contextmanager
def failure_recorded(run: Run, record: PushRecord) -> Iterator[None]:
    """Save the record with state `failed` if the block raises. If the Hub refused, say in the error what is already there."""
    try:
        yield
    except Exception as error:
        told = (
            str(error) if isinstance(error, MedcotError) else " ".join([type(error).__name__, *getattr(error, "__notes__", [])])
        )
        if isinstance(error, HubRefusal):
            lies = [f"{one['repo_id']}: {', '.join(one['commits'])}" for one in record["repositories"] if one["commits"]]
            there = f"Already on the Hub, and kept: {'; '.join(lies)}" if lies else "This push has committed nothing"
            again = f"A second `medcot push` sends only what is missing; {RECORD} in the run says what was sent"
            told = f"not pushed: {error}. {there}. {again}"
        save_record(run, record | {"state": "failed", "error": redact(told)})
        if isinstance(error, HubRefusal):
            raise HubError(told) from None
        raise


def file_lines(record: PushRecord) -> list[dict[str, str | int]]:
    """Return one line per file that was compared or deleted."""
    lines: list[dict[str, str | int]] = []
    for entry in record["repositories"]:
        place = entry["repo_id"]
        for one in entry["files"]:
            sent = "was there" if not one["sent"] else "replaced" if one["replaced"] else "yes"
            line = {"file": f"{place}/{one['path']}", "bytes": one["bytes"], "sha256": one["sha256"][:12], "sent": sent}
            lines.append(line | {"read back": one.get("fault") or f"{one['downloaded']}, agrees"})
        for one in entry["deleted"]:
            line = {"file": f"{place}/{one['path']}", "bytes": one["bytes"], "sha256": "", "sent": "deleted"}
            lines.append(line | {"read back": "gone"})
    return lines


def push_table(record: PushRecord | None) -> pd.DataFrame | None:
    """Return `file_lines` as a table for notebook 07; None if nothing was pushed."""
    import pandas as pd

    return None if record is None else pd.DataFrame(file_lines(record)).set_index("file")
