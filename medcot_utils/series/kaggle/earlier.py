"""Find the run that an earlier session left, by its manifest, in a folder or a zip, and copy it whole.

Standard library only, because in a Kaggle session this runs before the pinned stack is used."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from medcot_utils.errors import MedcotError
from medcot_utils.machine.names import OutsideError, refuse_links_out, require_inside, resolve_below
from medcot_utils.plain_text import say
from medcot_utils.text_files import MAX_RECORD_BYTES, decode, parse_json, read_at_most, read_json

if TYPE_CHECKING:
    from medcot_utils.run.manifest import Manifest

RUN_NAME = "medcot-run"
_ROOM_BYTES = 2 * 1024**3
# Many files that are not runs are called manifest.json or end in .zip. zipfile raises RuntimeError for an encrypted one.
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class EarlierRun:
    """Hold a run found among the inputs: in a folder, or in a zip with the large files in a folder beside it."""

    source: Path  # the folder or the zip
    folder: Path  # the folder of its large files
    manifest: Manifest
    profile: str | None
    model: str

    @property
    def steps_done(self) -> int:
        return sum(step.get("state") == "done" for step in self.manifest["steps"].values())

    @property
    def last_made(self) -> str:
        return max((entry["made"] for entry in self.manifest["artifacts"].values()), default="")


def find_earlier(inputs: Path, say: Callable[[str], None] = say) -> list[EarlierRun]:
    """Return every run below `inputs`, in order of path.

    A run is skipped, and a line says so, if its manifest cannot be read, or if names or links lead out of it."""
    found = []
    for path in [*inputs.rglob("manifest.json"), *inputs.rglob("*.zip")]:
        try:
            found.append(_from_zip(path) if path.suffix == ".zip" else _from_folder(path.parent))
        except _UNREADABLE as error:
            say(f"{path}: left alone, it cannot be read as a run ({' '.join(str(error).split())})")
        except OutsideError as error:
            say(f"{path}: left alone. {error}")
    return sorted((run for run in found if run), key=lambda run: str(run.source))


def _from_folder(folder: Path) -> EarlierRun | None:
    if not (folder / "config.json").is_file():
        return None
    refuse_links_out(_root_of(folder))
    return _earlier(folder, folder, read_json(folder / "manifest.json"), read_json(folder / "config.json"))


def _from_zip(path: Path) -> EarlierRun | None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for name in archive.namelist():
            inside = PurePosixPath(name)
            beside = str(inside.with_name("config.json"))
            if inside.name == "manifest.json" and beside in names:
                folder = _folder_beside(path, inside, archive.infolist())
                return _earlier(path, folder, *(_read_member(archive, one) for one in (name, beside)))
    return None


def _folder_beside(path: Path, manifest: PurePosixPath, members: Iterable[zipfile.ZipInfo]) -> Path:
    """Return the folder of the large files of a zipped run. Raises OutsideError if a name or a link leads out of it."""
    for member in members:
        require_inside(member.orig_filename, path.name)  # the whole name: zipfile's own `filename` ends at a NUL
        if stat.S_ISLNK(member.external_attr >> 16):
            raise OutsideError(f"{path.name}: {member.filename} is a link, but a run is packed without links: pack the file")
    resolve_below(path.parent, path.name, path.parent.name)  # the zip itself may be a link
    inside = manifest.parent
    folder = resolve_below(path.parent, str(inside), path.name) if inside.parts else path.parent
    refuse_links_out(_root_of(folder))
    return folder


def _read_member(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as stream:
        return parse_json(decode(read_at_most(stream, MAX_RECORD_BYTES)))


def _earlier(source: Path, folder: Path, manifest: Any, config: Any) -> EarlierRun:
    try:
        model = config["model"]["name"]
        states = [step.get("state") for step in manifest["steps"].values()]
        made = [entry["made"] for entry in manifest["artifacts"].values()]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("it does not list steps and artifacts like a run") from None
    if not all(isinstance(text, str) for text in (model, *states, *made)):
        raise ValueError("its model, states, or times are not text")
    return EarlierRun(source, folder, manifest, config.get("profile"), model)


def copy_run(earlier: EarlierRun, run_dir: Path, say: Callable[[str], None] = say) -> None:
    """Copy an earlier run to `run_dir` whole: write it to a folder beside, and rename that.

    The merged model is left out if the disk has too little room. Raises MedcotError and OutsideError as `unzip` does."""
    from medcot_utils.machine.paths import make_private  # not yet importable when a session imports this module

    beside = run_dir.with_name(f".{run_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    make_private(beside)
    files = _files_of(earlier.folder)
    if sum(path.stat().st_size for path in files.values()) + _ROOM_BYTES > shutil.disk_usage(beside).free:
        files = {inside: path for inside, path in files.items() if inside.parts[0] != "merged"}
        say("too little room for the earlier run's merged model: it is left out, and notebook 07 makes it again")
    for inside, path in files.items():
        target = beside / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # without file modes, because Kaggle's inputs are read-only
    if earlier.source.suffix == ".zip":
        unzip(earlier.source, beside, earlier.folder.relative_to(earlier.source.parent))
    if run_dir.exists():
        run_dir.rmdir()
    beside.replace(run_dir)


def _root_of(folder: Path) -> Path:
    """Return the folder that holds all files of a run.

    A data set that was made from an output has the zip unpacked in a folder of the zip's name. Then the large files are one
    level above the small ones."""
    return folder.parent if folder.name == folder.parent.name == RUN_NAME else folder


def _files_of(folder: Path) -> dict[Path, Path]:
    """Return {path in the run: file}."""
    root = _root_of(folder)
    above = (path for path in root.rglob("*") if path.is_file() and not path.is_relative_to(folder))
    inside = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(root): path for path in above} | {path.relative_to(folder): path for path in inside}


def unzip(archive_path: Path, run_dir: Path, prefix: Path) -> None:
    """Unpack the members below `prefix` into `run_dir`. Existing files are newer, so they stay.

    Raises MedcotError, before anything is written, if the disk has too little room or a member's name leads out of `run_dir`."""
    with zipfile.ZipFile(archive_path) as archive:
        members = [
            (member, PurePosixPath(member.filename).relative_to(prefix.as_posix()))
            for member in archive.infolist()
            if not member.is_dir() and PurePosixPath(member.filename).is_relative_to(prefix.as_posix())
        ]
        size, free = sum(member.file_size for member, _ in members), shutil.disk_usage(run_dir).free
        if size > free:
            raise MedcotError(f"{archive_path.name} holds {size / 1e9:.1f} GB unpacked, but only {free / 1e9:.1f} GB are free")
        targets = [(member, resolve_below(run_dir, str(inside), archive_path.name)) for member, inside in members]
        for member, target in targets:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
