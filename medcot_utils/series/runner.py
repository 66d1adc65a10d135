"""Run the seven notebooks in order through papermill: skip those that are done, redo stale ones, and resume where one stopped."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from medcot_utils.config import (
    SECRETS_STAY_OUT,
    RunConfig,
    load_config,
    overrides_of,
    parse_overrides,
    parse_value,
)
from medcot_utils.data.account import describe_uses
from medcot_utils.errors import MedcotError, SeriesInterrupted, SeriesPaused, quote
from medcot_utils.local_paths import with_absolute_paths
from medcot_utils.machine import hardware, redaction
from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.durations import describe_end, describe_length, describe_time
from medcot_utils.machine.paths import HOME, PACKAGE, display_path, expand_home
from medcot_utils.models.engine import quiet_start
from medcot_utils.plain_text import say
from medcot_utils.run.accounts import settle
from medcot_utils.run.artifacts import ARTIFACTS, PROGRESS, STEPS
from medcot_utils.run.changes import describe_new_settings
from medcot_utils.run.clock import SESSION_STARTED, SessionClock, TimeBudgetReached
from medcot_utils.run.directory import Run
from medcot_utils.run.files import write_atomic
from medcot_utils.run.lock import RunError, hold
from medcot_utils.run.manifest import describe_costs
from medcot_utils.run.store import CONFIG
from medcot_utils.series.estimate import describe_rest
from medcot_utils.series.kernel import KERNEL, check_kernel
from medcot_utils.series.preflight import preflight
from medcot_utils.series.progress import Watch, watching
from medcot_utils.training.records import read_last

NOTEBOOKS = tuple(STEPS)
DATA, TRAINING = ARTIFACTS["data_report"].step, ARTIFACTS["adapter"].step
_MOST_REASONS = 5  # why a step is redone, in its line

# A headless kernel's own log (a note on its transport, the interrupt at shutdown) says nothing about the notebook.
QUIET_KERNEL = ["--IPKernelApp.log_level=50"]
# A series may be started in the folder of somebody else's run. Kernels, and processes that they start, must not import modules
# from there, and the setup cell must use the package that runs here.
_NOT_FROM_HERE = "--InteractiveShellApp.ignore_cwd=True"
_OWN_PACKAGE = {"MEDCOT_HOME": str(HOME), "PYTHONSAFEPATH": "1"}

Report = Callable[[str, int, int], None]
Show = Callable[[str], None] | None


class SeriesError(MedcotError):
    """Say that a notebook failed or cannot be run: its name, the cell's error, and where the partial notebook is."""


def notebooks_dir() -> Path:
    """Return the folder of the seven notebooks: MEDCOT_NOTEBOOKS if it is set, else beside the package (in a checkout) or inside
    it (in an installed wheel).

    The working folder does not count: if it is somebody else's run, its `notebooks` holds what they executed. Raises SeriesError
    if no folder holds all seven."""
    candidates = [HOME / "notebooks", PACKAGE / "notebooks"]
    if chosen := os.environ.get("MEDCOT_NOTEBOOKS"):
        candidates = [expand_home(chosen)]
    for folder in candidates:
        if all((folder / f"{name}.ipynb").exists() for name in NOTEBOOKS):
            return folder
    raise SeriesError(
        "the notebooks are not beside the package or in it: install the project again, or set MEDCOT_NOTEBOOKS to their folder"
    )


def plan_config(run_dir: Path, profile: str | None, overrides: Iterable[str]) -> tuple[RunConfig, str]:
    """Return the configuration of this call and lines on it, after the checks of `preflight` that need no network.

    The lines say where the configuration comes from, and count its rows and questions. If a check asks for a key, a
    person in a terminal can type it, which is not possible later under papermill. If a profile is given, the configuration starts
    from it. If not, an existing run keeps its stored settings, and the overrides replace some. Raises MedcotError for an unknown
    profile or setting, for a run that another process works in, and for the first check that fails."""
    overrides = list(overrides)
    if (run_dir / CONFIG).exists():
        with hold(run_dir, "medcot run"):  # so that a locked run is refused before checks that take a while
            pass
    if profile is None and (run_dir / CONFIG).exists():
        stored = Run.open(run_dir).config
        names = set(parse_overrides(overrides))
        kept = [pair for pair in overrides_of(stored) if pair.partition("=")[0] not in names]
        config, line = (
            load_config(stored.profile, [*kept, *overrides]),
            f"profile {stored.profile}: as in {display_path(run_dir)}",
        )
    else:
        name, line = hardware.resolve_profile(profile or "auto")
        config = load_config(name, overrides)
    there = Run.open_if_readable(run_dir)  # None for a new run, and for one that only --force can make readable again
    stored = there.config if there else None
    config = settle(with_absolute_paths(config, stored), there)
    counts = [check.line for check in preflight(config, run_dir, online=False) if check.name in ("data", "questions")]
    return config, "\n".join([line, *counts])


def parameters_of(notebook: Path) -> dict[str, object]:
    """Return {name: default} of a notebook's `parameters` cell.

    Python's own parser reads it: papermill's skips a line with a `=` in its comment, with only a warning."""
    import ast

    import nbformat

    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])]
    lines = [node for cell in cells for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
    named = [(target, node.value) for node in lines for target in node.targets if isinstance(target, ast.Name)]
    return {target.id: ast.literal_eval(value) for target, value in named}


def parse_parameter(name: str, text: str) -> object:
    """Return the value of a parameter from its text, by the type of its default in the notebooks; as YAML if it has no default.

    Raises SeriesError for a value of another type."""
    folder = notebooks_dir()
    defaults = {key: value for step in NOTEBOOKS for key, value in parameters_of(folder / f"{step}.ipynb").items()}
    default = defaults.get(name)
    value = parse_value(f"--parameter {name}", text.strip(), {type(default) if name in defaults else object})
    if isinstance(default, str):
        return value or ""
    if isinstance(default, int) and type(value) is not int:
        raise SeriesError(
            f"--parameter {name}: {quote(text)} is not of its type: expected a whole number, as in {name}={default}"
        )
    return value


def check_parameters(parameters: Mapping[str, Any], folder: Path) -> None:
    """Raise SeriesError if no notebook has a parameter, which papermill itself would only warn about, or if a parameter holds a
    secret, which papermill would write to the notebook."""
    texts = {f"--parameter {name}": str(value) for name, value in parameters.items()}
    if found := redaction.name_holders(texts, redaction.secrets_at_hand()):
        raise SeriesError(f"{'; '.join(found)}. {SECRETS_STAY_OUT}")
    known: set[str] = set().union(*(parameters_of(folder / f"{name}.ipynb") for name in NOTEBOOKS)) if parameters else set()
    for name in parameters:
        if name not in known:
            raise SeriesError(f"unknown notebook parameter {name!r}: the notebooks take {', '.join(sorted(known))}")


def run_series(
    run_dir: Path,
    config: RunConfig,
    first: int = 1,
    last: int = len(NOTEBOOKS),
    force: bool = False,
    parameters: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = say,
    report: Report = lambda name, cell, cells: None,
    show: Show = None,
) -> Run:
    """Run notebooks `first` to `last` in `run_dir`, and skip those that are done with these settings and inputs.

    Secrets are removed from the executed notebooks before they are written. Finished work is kept, and the next call resumes
    there.

    Args:
        report: called as `report(name, cell, cells)` before each cell.
        show: called every two seconds with a line on the current work; without it, `say` gets that line every five minutes.

    Raises:
        RunError: if another process works in the run; nothing is written then.
        SeriesError: at the first notebook that lacks what it reads, that fails, or whose kernel dies.
        SeriesPaused: if training.max_hours ended the work.
        SeriesInterrupted: at Ctrl-C."""
    folder = notebooks_dir()
    os.environ.setdefault(SESSION_STARTED, str(time.time()))
    os.environ.update(_OWN_PACKAGE)
    check_parameters(parameters or {}, folder)
    check_kernel()
    quiet_start(config.seed)
    redaction.known_secrets(config.secrets)  # so that `redact` knows all secrets, also those that no kernel gets
    Run.check_place(run_dir, config, force)
    with hold(run_dir, "medcot run"):
        before = (run_dir / CONFIG).read_text(encoding="utf-8") if (run_dir / CONFIG).exists() else None
        there, began = Run.open_if_readable(run_dir), time.time()
        run = Run.create(run_dir, config, force)
        changes = describe_new_settings(there.config, run.config) if there else []
        reached = ["before the first cell"]

        def report_and_remember(name: str, cell: int, cells: int) -> None:
            reached[:] = [f"in {name}, cell {cell} of {cells}"]
            report(name, cell, cells)

        def run_steps(names: Iterable[str]) -> int:
            return _run_steps(run, names, folder, force, parameters or {}, say, report_and_remember, show)

        names = NOTEBOOKS[first - 1 : last]
        try:
            ran = run_steps(names[:1]) if first == 1 else 0
            # Only now, because notebook 01 may refuse the settings, and nothing has changed then.
            rest = names[1:] if first == 1 else names
            for line in (*(f"changed: {change}" for change in changes), *describe_rest(run, rest, force)):
                say(line)
            ran += run_steps(rest)
        except KeyboardInterrupt:
            raise SeriesInterrupted(f"interrupted {reached[0]}{_training_step(run)}; the same command resumes") from None
        except SeriesError:
            if first == 1 and run.step_state(NOTEBOOKS[0]) == "failed":  # notebook 01 refuses settings that cannot be used
                _put_back(run_dir / CONFIG, before)
            raise
    if ran > 1:
        say(f"{ran} notebooks run in {describe_length(time.time() - began)}")
    return run


def _training_step(run: Run) -> str:
    """Return text such as `, at step 14 of 90` if the run is training and has taken a step; else ""."""
    entry = run.manifest()["steps"].get(TRAINING, {})
    files = [file for file in run.path.glob(f"checkpoints/*/{PROGRESS}") if file.stat().st_mtime > entry.get("started", 0)]
    if entry.get("state") != "running" or not files:
        return ""
    state = read_last(max(files, key=lambda file: file.stat().st_mtime))
    return f", at step {state['step']} of {state['max_steps']}" if state else ""


def _put_back(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        write_atomic(path, text)


def _run_steps(
    run: Run,
    names: Iterable[str],
    folder: Path,
    force: bool,
    parameters: Mapping[str, Any],
    say: Callable[[str], None],
    report: Report,
    show: Show,
) -> int:
    """Run those of the notebooks that are not done, and return how many ran."""
    clock, worked, ran = SessionClock(run.config.training.max_hours), False, 0
    for name in names:
        asked = sorted(parameters.keys() & parameters_of(folder / f"{name}.ipynb"))
        state = run.step_state(name)
        if state == "done" and not asked and not force:
            say(f"{name}: skipped, done before with the same settings and inputs")
            continue
        if worked and clock.is_over():
            raise SeriesPaused(
                f"{name} does not begin, because training.max_hours is nearly over; the same command resumes there"
            )
        worked = name != NOTEBOOKS[0]  # notebook 01 alone would be no progress
        try:
            run.require_inputs(name)
        except RunError as error:
            rest = shlex.join(["medcot", "run", "--run-dir", str(run.path)])
            raise SeriesError(f"notebook {name} cannot begin: {error}. This runs all that is not done: {rest}") from None
        if force:
            run.forget(name)
        elif state in ("done", "stale"):
            say(f"{name}: redone, because {_in_short(run.why_stale(name) or [f'{one} is given' for one in asked])}")
        given = {"RUN_DIR": str(run.path.absolute()), **parameters}
        if name == NOTEBOOKS[0]:
            given |= {"PROFILE": run.config.profile, "OVERRIDES": overrides_of(run.config)}
        if name != NOTEBOOKS[0] and (estimate := run.estimate(name)):  # notebook 01 is about to make it anew
            say(f"{name}: {describe_time(estimate)}, {describe_end(estimate, time.time())}")
        _run_notebook(run, folder / f"{name}.ipynb", given, report, say, show)
        say(f"{name}: {describe_costs(run.manifest()['steps'][name])}")
        if name == DATA:
            say(f"{name}: {describe_uses(run.read('data_report'), run.config)}")
        ran += 1
    return ran


def _in_short(reasons: list[str]) -> str:
    more = f", and {len(reasons) - _MOST_REASONS} more" if len(reasons) > _MOST_REASONS else ""
    return ", ".join(reasons[:_MOST_REASONS]) + more


def _run_notebook(
    run: Run, notebook: Path, given: Mapping[str, Any], report: Report, say: Callable[[str], None], show: Show
) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    name = notebook.stem
    executed = run.path / "notebooks" / notebook.name
    executed.parent.mkdir(exist_ok=True)
    known = parameters_of(notebook)
    # papermill only warns about parameters that its own parser overlooked, since unknown ones are refused before, and it also
    # raises the errors that it logs.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    try:
        with watching(name, None if name == NOTEBOOKS[0] else run.estimate(name), say, show) as watch:
            _register_engine(name, report, watch)
            papermill.execute_notebook(
                _escape(notebook),
                _escape(executed),
                parameters={key: value for key, value in given.items() if key in known},
                engine_name="medcot",
                progress_bar=False,
                kernel_name=KERNEL,
                extra_arguments=[*QUIET_KERNEL, _NOT_FROM_HERE],
            )
    except OSError:  # papermill writes the notebook after each cell
        with full_disk_told(run.display(executed), run.path):
            raise
    except (PapermillExecutionError, DeadKernelError) as error:
        if isinstance(error, PapermillExecutionError) and error.ename == TimeBudgetReached.__name__:
            run.record_step(name, state="paused", error=error.evalue)
            raise SeriesPaused(f"{name}: {error.evalue}") from error
        if isinstance(error, PapermillExecutionError):
            # An error may have many lines, and the message of another library may repeat a secret that it was given.
            why = redaction.redact(" ".join(f"{error.ename}: {error.evalue}".split()))
        else:
            why = "its kernel died (killed, or out of memory)"
        run.record_step(name, state="failed", error=why)
        partial = f"The partial notebook is {run.display(executed)}; the same command resumes there"
        raise SeriesError(f"notebook {name} failed: {why}. {partial}") from error
    if run.step_state(name) != "done":
        raise SeriesError(f"notebook {name} ended without recording its results: its last cell did not run")


def _escape(path: Path) -> str:
    """Return a path escaped for papermill, which reads text in braces as a parameter's name."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _register_engine(name: str, report: Report, watch: Watch) -> None:
    from papermill.engines import NBClientEngine, papermill_engines

    class ReportingEngine(NBClientEngine):
        """Report each cell before nbclient's engine runs it, and write no secret."""

        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
            cell_start, save, cells = nb_man.cell_start, nb_man.save, len(nb_man.nb.cells)
            copies = redaction.ClearedCopies()

            def reporting_start(cell, cell_index=None, **more):
                report(name, (cell_index or 0) + 1, cells)
                watch.begin_cell(nb_man.nb.cells, cell_index or 0)
                return cell_start(cell, cell_index, **more)

            def save_a_copy(**more):
                whole, nb_man.nb = nb_man.nb, copies.make(nb_man.nb)
                try:
                    return save(**more)
                finally:
                    nb_man.nb = whole

            nb_man.cell_start, nb_man.save = reporting_start, save_a_copy
            try:
                return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
            finally:  # papermill writes this notebook at the end, and makes its error from it
                nb_man.nb, nb_man.save = copies.make(nb_man.nb), save

    papermill_engines.register("medcot", ReportingEngine)
