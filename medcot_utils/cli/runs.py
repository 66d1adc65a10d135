"""The run that a command works on. If none is given, an error lists the runs that are here."""

from __future__ import annotations

from pathlib import Path

from medcot_utils.errors import MedcotError

RUNS = Path("runs")  # the default folder of `medcot run`


def choose_run(run_dir: Path | None) -> Path:
    """Return the run directory that was given. If none was given, raise a MedcotError that lists the runs below runs/."""
    from medcot_utils.run.store import CONFIG

    if run_dir is not None:
        return run_dir
    found = sorted(str(file.parent) for file in RUNS.glob(f"*/{CONFIG}"))
    if not found:
        raise MedcotError(f"which run? There is none in {RUNS}/: give its directory, or make one with `medcot run`")
    raise MedcotError(f"which run? Found in {RUNS}/: {', '.join(found)}. Give one of these, or another directory")
