"""Inside a Kaggle session: take up an earlier session's run, run the series, leave the run as output.

The cells of the pushed notebook call these. Standard library only until the pinned stack is installed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medcot_utils.errors import MedcotError
from medcot_utils.machine.installing import HOME

RUN_NAME = "medcot-run"
EX_PAUSED = 75
# Smaller files go into the zip, except what people look for by itself.
_SMALL_BYTES = 8_000_000
_BY_ITSELF = ("report.html", "adapter")
_ROOM_BYTES = 2 * 1024**3


class SessionError(MedcotError):
    """The series did not complete in this session; the message says why and what to do."""


@dataclass(frozen=True)
class Earlier:
    """A run found among the inputs: in a folder, or in a zip with its large files in the folder beside it."""

    source: Path
    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]

    def is_of(self, profile: str, model: str) -> bool:
        return (self.config.get("profile"), self.config["model"]["name"]) == (profile, model)

    @property
    def steps_done(self) -> int:
        return sum(step.get("state") == "done" for step in self.manifest["steps"].values())

    @property
    def last_made(self) -> str:
        return max((entry["made"] for entry in self.manifest["artifacts"].values()), default="")


def read_secrets(profile: str, settings: Iterable[str] = ()) -> None:
    """Hand what the secret stores hold to the series, in its environment, under the names that the settings say; show where
    each was found, never a value. Raises ConfigError for settings that are none."""
    from medcot_utils.config import load_config
    from medcot_utils.machine import secrets

    names = load_config(profile, settings).secrets
    for service, place in secrets.secrets_found(names).items():  # first: handed on, all would be found in the environment
        print(f"{service}: {place}")
    secrets.hand_on_secrets(names)


def resolved_profile(profile: str) -> str:
    """The profile that `auto` means here. In a process of its own: asking a GPU for its memory would hold some of it."""
    if profile != "auto":
        return profile
    code = "from medcot_utils.machine.hardware import resolve_profile as r; print(r('auto')[0])"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def take_up(
    run_dir: Path,
    profile: str | None = None,
    settings: Iterable[str] = (),
    sources: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Copy the furthest run that lies among the session's inputs to `run_dir`, unless one is there already: of the same
    profile and model where a profile is named. Found by its manifest, in a folder or in a zip.

    Raises ConfigError for settings that are none, and SessionError where `sources` say that the session is to go on from
    them and no fitting run is there: to start anew would take a session's time for what is done already."""
    from medcot_utils.machine.paths import kaggle_root

    unpack_own(run_dir)
    if (run_dir / "config.json").exists():
        say(f"going on with the run that is in {run_dir.name}/")
        return
    fitting = find_earlier(kaggle_root() / "input")
    if profile is not None:
        from medcot_utils.config import load_config

        wanted = load_config(profile, settings)
        for run in fitting:
            if not run.is_of(wanted.profile, wanted.model.name):
                say(f"{run.source}: a run of profile {run.config.get('profile')} and {run.config['model']['name']}, left alone")
        fitting = [run for run in fitting if run.is_of(wanted.profile, wanted.model.name)]
    if not fitting and (named := list(sources)):
        wanted_by = f" of profile {profile} and its model" if profile else ""
        raise SessionError(
            f"no earlier run{wanted_by} among the inputs, although this session was built to go on from {', '.join(named)}. Is "
            f"there a run in that output, of the same --profile and model? To start from the beginning, take what does not "
            f"belong there out of kernel-metadata.json, build and push again"
        )
    if not fitting:
        say("no earlier run among the inputs: starting from the beginning")
        return
    chosen = max(fitting, key=lambda run: (run.steps_done, run.last_made))
    copy_run(chosen, run_dir, say)
    say(f"going on with {chosen.source}: {chosen.steps_done} notebooks are done there")


def find_earlier(inputs: Path) -> list[Earlier]:
    """Every run below `inputs`, in order of path."""
    runs = [_from_folder(path.parent) for path in inputs.rglob("manifest.json")]
    runs += [_from_zip(path) for path in inputs.rglob("*.zip")]
    return sorted((run for run in runs if run), key=lambda run: str(run.source))


def _from_folder(folder: Path) -> Earlier | None:
    try:
        texts = [(folder / name).read_text(encoding="utf-8") for name in ("manifest.json", "config.json")]
    except OSError:
        return None
    return _earlier(folder, folder, *texts)


def _from_zip(path: Path) -> Earlier | None:
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


def _earlier(source: Path, folder: Path, manifest_text: str, config_text: str) -> Earlier | None:
    # Many things are called manifest.json: a run's says which notebooks and artifacts it knows of.
    try:
        manifest, config = json.loads(manifest_text), json.loads(config_text)
        is_run = isinstance(manifest["steps"], dict) and isinstance(manifest["artifacts"], dict) and config["model"]["name"]
    except (ValueError, KeyError, TypeError):
        return None
    return Earlier(source, folder, manifest, config) if is_run else None


def copy_run(earlier: Earlier, run_dir: Path, say: Callable[[str], None] = print) -> None:
    """Copy an earlier run whole to `run_dir`, written beside and renamed. Without its merged model where that does not fit."""
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
        _unzip(earlier.source, beside, earlier.folder.relative_to(earlier.source.parent))
    if run_dir.exists():
        run_dir.rmdir()
    beside.replace(run_dir)


def _files_of(folder: Path) -> dict[Path, Path]:
    """{place in the run: file}. A data set made of an output holds its zip unpacked, in a folder of the zip's name: then the
    large files lie one level above the small ones."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    above = folder.parent
    if folder.name == above.name == RUN_NAME:
        outside = (path for path in above.rglob("*") if path.is_file() and not path.is_relative_to(folder))
        files = {path.relative_to(above): path for path in outside} | files
    return files


def _unzip(archive_path: Path, run_dir: Path, prefix: Path) -> None:
    """Unpack the members below `prefix` into `run_dir`. What lies there already is newer, and stays."""
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


def unpack_own(run_dir: Path) -> None:
    """Put the files of `leave_output`'s zip back into `run_dir`, where cells are run a second time."""
    archive = run_dir.with_suffix(".zip")
    if archive.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        _unzip(archive, run_dir, Path(RUN_NAME))
        archive.unlink()


def run_series(run_dir: Path, profile: str, settings: Iterable[str]) -> int:
    """`medcot run` in a process of its own, its lines shown as they come. The exit code: 0 done, 75 paused, else failed."""
    command = [sys.executable, "-m", "medcot_utils", "run", "--profile", profile, "--run-dir", str(run_dir)]
    command += [part for pair in settings for part in ("--set", pair)]
    with subprocess.Popen(
        command, cwd=HOME, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as started:
        try:
            for line in started.stdout:
                print(line, end="", flush=True)
        finally:
            if started.poll() is None and sys.exc_info()[0] is not None:  # the cell was stopped by hand
                started.terminate()
    return started.returncode


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    # A kernel tells its children that they write to a terminal: a saved notebook wants lines, not redrawn bars.
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE")}
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "140", "TERM": "dumb"}


def show_report(run_dir: Path) -> Any:
    """The run's report for the end of a cell, in a frame of its own; a line of text while there is none."""
    from IPython.display import HTML

    page = run_dir / "report.html"
    if not page.exists():
        return "no report yet: notebook 06 makes it"
    from html import escape

    text = escape(page.read_text(encoding="utf-8"), quote=True)
    return HTML(f'<div><iframe title="Report of the run" style="width:100%;height:900px" srcdoc="{text}"></iframe></div>')


def leave_output(run_dir: Path) -> Path | None:
    """Put the run's many small files into one zip beside the run directory, where adapter, report and large files stay.

    The zip is written whole and read back before a file is removed. None if there is no run."""
    if not (run_dir / "config.json").exists():
        return None
    unpack_own(run_dir)
    packed = list(_small_files(run_dir))
    final = run_dir.with_suffix(".zip")
    beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in packed:
            archive.write(path, f"{RUN_NAME}/{path.relative_to(run_dir).as_posix()}")
    with zipfile.ZipFile(beside) as archive:
        if broken := archive.testzip():
            raise SessionError(f"{final.name} could not be written ({broken} in it is broken): is the disk full?")
    with beside.open("rb") as stream:
        os.fsync(stream.fileno())
    beside.replace(final)
    for path in packed:
        path.unlink()
    for folder in sorted((path for path in run_dir.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    left = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file()) / 1e6
    print(f"{final.name}: {len(packed)} files, {final.stat().st_size / 1e6:.1f} MB; beside it in {run_dir.name}/: {left:.1f} MB")
    return final


def _small_files(run_dir: Path) -> Iterator[Path]:
    for path in sorted(run_dir.rglob("*")):
        inside = path.relative_to(run_dir)
        if path.is_file() and inside.parts[0] not in _BY_ITSELF and path.stat().st_size < _SMALL_BYTES:
            yield path


def end(code: int, kernel: str, profile: str, settings: Iterable[str] = ()) -> None:
    """The last cell: say what the series' exit code means. Raises SessionError if it failed, so that the session counts so."""
    again = continue_command(kernel, profile, settings)
    if code == 0:
        print(f"The series is complete. To fetch the run: medcot kaggle output {kernel}")
    elif code == EX_PAUSED:
        print(f"Paused in good time, nothing failed. To go on in another session, from a checkout: {again}")
    else:
        raise SessionError(
            f"the series ended with exit code {code}; its last lines above say why. What was made is in the output. With the "
            f"cause mended, go on there: {again}"
        )


def continue_command(kernel: str, profile: str, settings: Iterable[str] = ()) -> str:
    """The whole command, for a shell, that goes on with a kernel's session in another one: same profile, same settings."""
    words = ["medcot", "kaggle", "build", "--id", next_kernel(kernel), "--continue-from", kernel, "--profile", profile]
    words += [word for pair in settings for word in ("--set", pair)]
    return f"{shlex.join(words)} && medcot kaggle push"


def next_kernel(kernel: str) -> str:
    """A name for the session after this one: owner/medcot-series, owner/medcot-series-2, owner/medcot-series-3, ..."""
    name, _, number = kernel.rpartition("-")
    return f"{name}-{int(number) + 1}" if number.isdigit() else f"{kernel}-2"
