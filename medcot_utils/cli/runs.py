"""The run that a command works on. If none is given, it is the only one in runs/, or an error lists those that are there."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import typer

from medcot_utils.errors import MedcotError
from medcot_utils.plain_text import show_controls

RUNS = Path("runs")  # the default folder of `medcot run`


def choose_run(run_dir: Path | None) -> Path:
    """Return the run directory that was given or, if none was given, the only one in runs/, which one line on stderr names.

    Raises MedcotError if there is none or several, and lists them."""
    from medcot_utils.run.store import CONFIG

    if run_dir is not None:
        return run_dir
    found = sorted(str(file.parent) for file in RUNS.glob(f"*/{CONFIG}"))
    if not found:
        raise MedcotError(f"which run? There is none in {RUNS}/: give its directory, or make one with `medcot run`")
    if len(found) == 1:
        typer.echo(f"run directory: {show_controls(found[0])}, the only run in {RUNS}/", err=True)  # stdout may be JSON
        return Path(found[0])
    raise MedcotError(f"which run? Found in {RUNS}/: {', '.join(found)}. Give one of these, or another directory")


def next_steps(run_dir: Path, states: Mapping[str, str]) -> Iterator[str]:
    """Yield what to do with a run: complete it; then compare it with the newest other one beside it that was asked the same
    questions, and keep it before it changes.

    `states`: {notebook: its state}, as `medcot status` shows it."""
    from medcot_utils.run.artifacts import ARTIFACTS

    if "running" not in states.values() and set(states.values()) != {"done"}:
        yield f"to run what is not done: {shlex.join(['medcot', 'run', '--run-dir', str(run_dir)])}"
    if states[ARTIFACTS["metrics"].step] != "done":
        return
    file, asked = ARTIFACTS["metrics"].file, _compared_questions(run_dir)
    beside = [path for path in run_dir.absolute().parent.glob(f"*/{file}") if path.parent.name != run_dir.absolute().name]
    newest_first = sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True) if asked else []
    if found := next((path for path in newest_first if _compared_questions(path.parent) == asked), None):
        other = run_dir.parent / found.parent.name
        older, newer = sorted((other, run_dir), key=lambda run: (run / file).stat().st_mtime)  # differences are from the older
        out = run_dir.parent / f"{older.absolute().name}-and-{newer.absolute().name}.html"
        pair = shlex.join(["medcot", "report", str(older), str(newer), "--out", str(out)])
        yield f"to compare this run with {other}: {pair}"
    copy = Path(f"{run_dir}-first")
    if not copy.exists():
        yield f"to keep this result, copy it before you change a setting: {shlex.join(['cp', '-r', str(run_dir), str(copy)])}"


def _compared_questions(run_dir: Path) -> str | None:
    """Return the digest of the questions whose answers a run has compared; None if it cannot be read, or its comparison is not
    done or stale."""
    from medcot_utils.run.artifacts import ARTIFACTS
    from medcot_utils.run.directory import Run

    try:
        with redirect_stderr(io.StringIO()):  # settings that do not count are said by the commands on that run
            run = Run.open(run_dir)
        is_compared = run.step_state(ARTIFACTS["metrics"].step, deep=False) == "done"
        return run.manifest()["artifacts"]["questions"]["sha256"] if is_compared else None
    except MedcotError:  # it is only offered, and the command on it says what is wrong
        return None
