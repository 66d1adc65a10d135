"""Inside a Kaggle session: resume the run of an earlier session, run the series, and leave the run as output.

The cells of the pushed notebook call these functions. Standard library only until the pinned stack is installed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medcot_utils.errors import EX_PAUSED, MedcotError
from medcot_utils.machine.installing import HOME
from medcot_utils.plain_text import say
from medcot_utils.series.kaggle.earlier import RUN_NAME, copy_run, find_earlier, unzip

# Smaller files are zipped, except those that people want to open directly.
_SMALL_BYTES = 8_000_000
_BY_ITSELF = ("report.html", "adapter")


class SessionError(MedcotError):
    """Say why the series was not completed in this session, and what to do."""


def read_secrets(profile: str, settings: Iterable[str] = ()) -> None:
    """Put the secrets found under the settings' names into the environment of the series.

    Print where each was found, but never its value. Raises ConfigError for an unknown setting."""
    from medcot_utils.config import load_config
    from medcot_utils.machine import secrets

    names = load_config(profile, settings).secrets
    for service, place in secrets.secrets_found(names).items():  # before they are all in the environment
        say(f"{service}: {place}")
    secrets.hand_on_secrets(names)


def resolved_profile(profile: str) -> str:
    """Return the profile that `auto` means here. Another process finds it, because querying a GPU's memory uses some of it."""
    if profile != "auto":
        return profile
    code = "from medcot_utils.machine.hardware import resolve_profile as r; print(r('auto')[0])"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def resume_earlier_run(
    run_dir: Path,
    profile: str | None = None,
    settings: Iterable[str] = (),
    sources: Iterable[str] = (),
    say: Callable[[str], None] = say,
) -> None:
    """Copy the run that is furthest along among the session's inputs to `run_dir`, unless a run is already there.

    If a profile is given, the run must have that profile and its model. Raises ConfigError for an unknown setting. Raises
    SessionError if `sources` name earlier sessions to resume but no input holds a matching run, because starting over would
    spend a session on finished work."""
    from medcot_utils.machine.paths import kaggle_root

    unpack_own(run_dir)
    if (run_dir / "config.json").exists():
        say(f"resuming the run in {run_dir.name}/")
        return
    fitting = find_earlier(kaggle_root() / "input", say)
    if profile is not None:
        from medcot_utils.config import load_config

        wanted = load_config(profile, settings)
        found, fitting = fitting, []
        for run in found:
            if (run.profile, run.model) == (wanted.profile, wanted.model.name):
                fitting.append(run)
            else:
                say(f"{run.source}: a run of profile {run.profile} and {run.model}, left alone")
    if not fitting and (named := list(sources)):
        wanted_by = f" of profile {profile} and its model" if profile else ""
        raise SessionError(
            f"no earlier run{wanted_by} among the inputs, although this session was built to resume {', '.join(named)}. Is there "
            f"a run in that output, of the same --profile and model? To start from the beginning, remove those sources from "
            f"kernel-metadata.json, build and push again"
        )
    if not fitting:
        say("no earlier run among the inputs: starting from the beginning")
        return
    chosen = max(fitting, key=lambda run: (run.steps_done, run.last_made))
    copy_run(chosen, run_dir, say)
    say(f"resuming {chosen.source}: {chosen.steps_done} notebooks are done there")


def unpack_own(run_dir: Path) -> None:
    """Move the files of `leave_output`'s zip back into `run_dir`, for cells that run a second time."""
    archive = run_dir.with_suffix(".zip")
    if archive.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        unzip(archive, run_dir, Path(RUN_NAME))
        archive.unlink()


def run_medcot(run_dir: Path, profile: str, settings: Iterable[str]) -> int:
    """Run `medcot run` in another process, and print its lines as they come, without secrets.

    Return its exit code: 0 if it is done, 75 if it paused, and another if it failed."""
    from medcot_utils.machine.redaction import redact

    command = [sys.executable, "-m", "medcot_utils", "run", "--profile", profile, "--run-dir", str(run_dir)]
    command += [part for pair in settings for part in ("--set", pair)]
    with subprocess.Popen(
        command, cwd=HOME, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as started:
        try:
            for line in started.stdout:
                sys.stdout.write(redact(line))
                sys.stdout.flush()
        finally:
            if started.poll() is None and sys.exc_info()[0] is not None:  # the user stopped the cell
                started.terminate()
    return started.returncode


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    # A kernel tells its children that they write to a terminal, but a saved notebook needs lines, not redrawn bars.
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE")}
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "140", "TERM": "dumb"}


def show_report(run_dir: Path) -> Any:
    """Return the run's report in a frame, as the value of a cell; a line of text if there is no report yet."""
    from IPython.display import HTML

    page = run_dir / "report.html"
    if not page.exists():
        return "no report yet: notebook 06 makes it"
    from html import escape

    text = escape(page.read_text(encoding="utf-8"), quote=True)
    # In the sandbox, the report's own script can filter its questions but cannot reach the page around it.
    frame = '<iframe title="Report of the run" sandbox="allow-scripts" style="width:100%;height:900px"'
    return HTML(f'<div>{frame} srcdoc="{text}"></iframe></div>')


def leave_output(run_dir: Path) -> Path | None:
    """Pack the run's many small files into one zip beside the run directory. Adapter, report, and large files stay there.

    The zip is written whole and read back before any file is removed. Return the zip; None if there is no run. Raises
    SessionError if the zip cannot be read back."""
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
        if folder.is_symlink():  # W&B leaves a link to its latest run, which may be gone by now
            folder.unlink()
        elif not any(folder.iterdir()):
            folder.rmdir()
    left = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file()) / 1e6
    say(f"{final.name}: {len(packed)} files, {final.stat().st_size / 1e6:.1f} MB; beside it in {run_dir.name}/: {left:.1f} MB")
    return final


def _small_files(run_dir: Path) -> Iterator[Path]:
    for path in sorted(run_dir.rglob("*")):
        inside = path.relative_to(run_dir)
        if path.is_file() and inside.parts[0] not in _BY_ITSELF and path.stat().st_size < _SMALL_BYTES:
            yield path


def end(code: int, kernel: str, profile: str, settings: Iterable[str] = ()) -> None:
    """Print what the exit code of the series means. Raises SessionError if the series failed, so that the session fails too."""
    again = continue_command(kernel, profile, settings)
    if code == 0:
        say(f"The series is complete. To fetch the run: medcot kaggle output {kernel}")
    elif code == EX_PAUSED:
        say(f"Paused before the session's time was over; nothing failed. To resume in another session, from a checkout: {again}")
    else:
        raise SessionError(
            f"the series ended with exit code {code}; its last lines above say why. The finished work is in the output. After "
            f"fixing the cause, resume there: {again}"
        )


def continue_command(kernel: str, profile: str, settings: Iterable[str] = ()) -> str:
    """Return the shell command that resumes a kernel's session in a new one, with the same profile and settings."""
    words = ["medcot", "kaggle", "build", "--id", next_kernel(kernel), "--continue-from", kernel, "--profile", profile]
    words += [word for pair in settings for word in ("--set", pair)]
    return f"{shlex.join(words)} && medcot kaggle push"


def next_kernel(kernel: str) -> str:
    """Return a name for the next session: owner/medcot-series, owner/medcot-series-2, ..."""
    name, _, number = kernel.rpartition("-")
    return f"{name}-{int(number) + 1}" if number.isdigit() else f"{kernel}-2"
