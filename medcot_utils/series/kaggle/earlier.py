"""A run that an earlier session left: found by its manifest, in a folder or in a zip, and copied whole.

Standard library only: in a Kaggle session this runs before the pinned stack is used."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medcot_utils.run.manifest import Manifest

RUN_NAME = "medcot-run"
_ROOM_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class EarlierRun:
    """A run found among the inputs: in a folder, or in a zip with its large files in the folder beside it."""

    source: Path  # the folder or the zip
    folder: Path  # of its large files
    manifest: Manifest
    profile: str | None
    model: str

    @property
    def steps_done(self) -> int:
        return sum(step.get("state") == "done" for step in self.manifest["steps"].values())

    @property
    def last_made(self) -> str:
        return max((entry["made"] for entry in self.manifest["artifacts"].values()), default="")


def find_earlier(inputs: Path) -> list[EarlierRun]:
    """Return every run below `inputs`, in order of path."""
    runs = [_from_folder(path.parent) for path in inputs.rglob("manifest.json")]
    runs += [_from_zip(path) for path in inputs.rglob("*.zip")]
    return sorted((run for run in runs if run), key=lambda run: str(run.source))


def _from_folder(folder: Path) -> EarlierRun | None:
    try:
        texts = [(folder / name).read_text(encoding="utf-8") for name in ("manifest.json", "config.json")]
    except OSError:
        return None
    return _earlier(folder, folder, *texts)


def _from_zip(path: Path) -> EarlierRun | None:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                inside = PurePosixPath(name)
                if inside.name == "manifest.json" and str(inside.with_name("config.json")) in archive.namelist():
                    texts = [archive.read(str(inside.with_name(n))).decode() for n in ("manifest.json", "config.json")]
                    return _earlier(path, path.parent / inside.parent, *texts)
    except (zipfile.BadZipFile, UnicodeDecodeError):
        return None
    return None


def _earlier(source: Path, folder: Path, manifest_text: str, config_text: str) -> EarlierRun | None:
    # Many files are called manifest.json: a run's lists its steps and artifacts.
    try:
        manifest, config = json.loads(manifest_text), json.loads(config_text)
        model = config["model"]["name"]
        is_run = isinstance(manifest["steps"], dict) and isinstance(manifest["artifacts"], dict) and model
    except (ValueError, KeyError, TypeError):
        return None
    return EarlierRun(source, folder, manifest, config.get("profile"), model) if is_run else None


def copy_run(earlier: EarlierRun, run_dir: Path, say: Callable[[str], None] = print) -> None:
    """Copy an earlier run whole to `run_dir`, written beside and renamed. Its merged model stays behind if it does not fit."""
    beside = run_dir.with_name(f".{run_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    files = _files_of(earlier.folder)
    if sum(path.stat().st_size for path in files.values()) + _ROOM_BYTES > shutil.disk_usage(beside).free:
        files = {inside: path for inside, path in files.items() if inside.parts[0] != "merged"}
        say("too little room for the earlier run's merged model: it is left out, and notebook 07 makes it again")
    for inside, path in files.items():
        target = beside / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # inputs are read-only, and their modes would come along with another copy
    if earlier.source.suffix == ".zip":
        unzip(earlier.source, beside, earlier.folder.relative_to(earlier.source.parent))
    if run_dir.exists():
        run_dir.rmdir()
    beside.replace(run_dir)


def _files_of(folder: Path) -> dict[Path, Path]:
    """Return {path in the run: file}. A data set made of an output holds its zip unpacked, in a folder of the zip's name: then
    the large files lie one level above the small ones."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    above = folder.parent
    if folder.name == above.name == RUN_NAME:
        outside = (path for path in above.rglob("*") if path.is_file() and not path.is_relative_to(folder))
        files = {path.relative_to(above): path for path in outside} | files
    return files


def unzip(archive_path: Path, run_dir: Path, prefix: Path) -> None:
    """Unpack the members below `prefix` into `run_dir`. A file that is there already is newer, and stays."""
    with zipfile.ZipFile(archive_path) as archive:
        for name in archive.namelist():
            inside = PurePosixPath(name)
            if name.endswith("/") or ".." in inside.parts or not inside.is_relative_to(prefix.as_posix()):
                continue
            target = run_dir / inside.relative_to(prefix.as_posix())
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
