"""The `medcot` command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from medcot_utils import __version__
from medcot_utils.cli import push
from medcot_utils.cli.chat import chat
from medcot_utils.cli.console import PlainConsole, console, say
from medcot_utils.cli.kaggle import app as kaggle_app
from medcot_utils.cli.runs import RUNS, choose_run, next_steps
from medcot_utils.config import PROFILES
from medcot_utils.errors import EX_INTERRUPTED, EX_PAUSED, MedcotError, SeriesInterrupted, SeriesPaused
from medcot_utils.machine import installing
from medcot_utils.machine.guarded_streams import guard_streams
from medcot_utils.machine.paths import expand_home
from medcot_utils.machine.redaction import kind_of, secrets_at_hand
from medcot_utils.plain_text import one_line

if TYPE_CHECKING:
    from medcot_utils.run.directory import Run
    from medcot_utils.series.status import Status

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a reasoning model on medical chain-of-thought data in seven notebooks, and judge the result.",
)
app.add_typer(kaggle_app, name="kaggle")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"medcot {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None: ...


RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", parser=expand_home, metavar="<path>", help="the run directory; if not given, runs/<profile>"),
]
# The notebooks' own parameters; a test compares them.
PARAMETERS = "a notebook parameter: QUESTION (asked in 02), SHOW_ROW (shown in 03), or SHOW (questions shown in 06)"
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="override a setting: --set training.max_steps=10; repeat for several"),
]


@app.command()
def run(
    profile: Annotated[
        str | None, typer.Option(help=f"{', '.join(PROFILES)} or auto; if not given, as in the run, else auto")
    ] = None,
    run_dir: RunDir = None,
    settings: Settings = None,
    first: Annotated[int, typer.Option("--from", min=1, max=7, help="first notebook")] = 1,
    last: Annotated[int, typer.Option("--to", min=1, max=7, help="last notebook")] = 7,
    force: Annotated[bool, typer.Option("--force", help="redo the notebooks even if nothing changed")] = False,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help=f"{PARAMETERS}; repeat for several"),
    ] = None,
) -> None:
    """Run the notebooks in order. A second call resumes at the first unfinished notebook.

    With --profile, the settings are the profile's, changed by --set. Without it, the run in --run-dir keeps its settings,
    and a new run takes auto: article on a GPU that can hold it, else demo."""
    from medcot_utils.machine import hardware

    if first > last:
        raise MedcotError(f"--from {first} is after --to {last}")
    folder = run_dir or RUNS / hardware.resolve_profile(profile or "auto")[0]
    _run_notebooks(folder, profile, settings or [], first, last, force, _parse_parameters(parameter or []))


@app.command()
def train(
    run_dir: Annotated[
        Path | None, typer.Argument(parser=expand_home, help="a run that notebooks 01 to 04 have prepared")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="processes, one per GPU; if not given, as the run's settings say")
    ] = None,
    settings: Settings = None,
) -> None:
    """Train a prepared run (notebook 05), on several GPUs if asked. The effective batch stays as set.

    A stopped training resumes from its last checkpoint. For several machines, see docs/gpu.md."""
    from medcot_utils.run.directory import Run

    run_dir = choose_run(run_dir)
    Run.open(run_dir)  # the run must exist, because train prepares nothing
    processes = [] if nproc is None else [f"training.num_processes={nproc}"]
    _run_notebooks(run_dir, None, [*processes, *(settings or [])], 5, 5, False, {})


def _run_notebooks(
    folder: Path,
    profile: str | None,
    settings: list[str],
    first: int,
    last: int,
    force: bool,
    parameters: dict[str, object],
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    from medcot_utils.series import runner
    from medcot_utils.series.status import read_status

    config, line = runner.plan_config(folder, profile, settings)
    say(*line.split("\n"))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("cells"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def count(name: str, cell: int, cells: int) -> None:
            progress.update(task, completed=cell, total=cells)
            if cell == 1 and not console.is_terminal:  # a log has no bar, so a line says which notebook is running
                say(f"{name}: started")

        finished = runner.run_series(
            folder,
            config,
            first,
            last,
            force,
            parameters,
            say=say,
            report=count,
            show=(lambda line: progress.update(task, description=one_line(line))) if console.is_terminal else None,
        )
    _print_status(read_status(finished), finished)


def _parse_parameters(pairs: list[str]) -> dict[str, object]:
    from medcot_utils.series import runner

    parsed = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise MedcotError(f"--parameter {pair}: expected NAME=VALUE")
        if name in ("RUN_DIR", "PROFILE", "OVERRIDES"):
            raise MedcotError(f"--parameter {name}: use --run-dir, --profile or --set")
        parsed[name] = runner.parse_parameter(name, value)
    return parsed


@app.command()
def status(
    run_dir: Annotated[Path | None, typer.Argument(parser=expand_home, help="a run directory")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Show what each step of a run has done, and the headline metrics."""
    from medcot_utils.run.directory import Run
    from medcot_utils.series.status import read_status

    run = Run.open(choose_run(run_dir))
    found = read_status(run)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print_status(found, run)


def _print_status(found: Status, run: Run) -> None:
    from medcot_utils.evaluation.merged_column import describe_stale, suggest_questions

    title = f"{run.path} (profile {found['profile']})"
    steps = Table("step", Column("state", overflow="fold"), "seconds", "peak memory", title=title, title_justify="left")
    if used_a_gpu := any(step["peak_gpu_memory_mb"] for step in found["steps"]):
        steps.add_column("of the GPU")
    for step in found["steps"]:
        gpu = step["peak_gpu_memory_mb"]
        cells = ["" if step["peak_memory_mb"] is None else f"{step['peak_memory_mb']} MB"]
        cells += ["" if gpu is None else f"{gpu['reserved']} MB"] if used_a_gpu else []
        seconds = "" if step["seconds"] is None else f"{step['seconds']:.0f}"
        steps.add_row(step["name"], step["state"] + (f": {step['error']}" if step["error"] else ""), seconds, *cells)
    console.print(steps)
    compared = next(step["state"] == "done" for step in found["steps"] if step["name"] == "06_comparison")
    if found["metrics"]:
        console.print(_metrics_table(run))
    elif stale := describe_stale(run, "metrics"):
        say(f"before and after: {stale}")
    elif compared:
        console.print("before and after: no headline metric was measured")
    if found["merged_verdict"] and compared:
        say(found["merged_verdict"], *filter(None, [suggest_questions(run)]))
    if found["metrics"] or compared:
        say(*(f"{what}: {path}" for what, path in _places(run)))
    say(*next_steps(run.path, {step["name"]: step["state"] for step in found["steps"]}))


def _places(run: Run) -> list[tuple[str, str]]:
    """Return (name, path) of each part of a finished run that a person or another program may want; a stale one is marked."""
    from medcot_utils.evaluation.merged_column import describe_stale

    wanted = {"report": "report", "adapter": "adapter", "merged model": "merged", "GGUF": "gguf", "model card": "model_card"}
    there = {what: (run.place(name), describe_stale(run, name)) for what, name in wanted.items() if run.place(name).exists()}
    marked = [(what, f"{path} ({stale})" if stale else str(path)) for what, (path, stale) in there.items()]
    notebooks = run.path / "notebooks"
    return [*marked, ("executed notebooks", str(notebooks))] if notebooks.exists() else marked


def _metrics_table(run: Run) -> Table:
    from medcot_utils.evaluation.comparison import format_side, metric_lines
    from medcot_utils.evaluation.headline import headline_rows
    from medcot_utils.evaluation.merged_column import read_merged

    rows = headline_rows(run.read("metrics"), read_merged(run))
    merged = any(row.merged for row in rows)
    title = f"before and after; brackets: {run.config.evaluation.confidence_level * 100:g} % intervals"
    columns = ["base", "tuned", *(["merged"] if merged else []), "difference"]
    table = Table("metric and verdict", title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        line = metric_lines({row.name: row.compared})[row.name]
        beside = [format_side(row.merged, "tuned") if row.merged else ""] if merged else []
        numbers = [line.base, line.tuned, *beside, line.difference]
        # Number and interval are on separate lines that do not break, so that the table fits in 80 columns.
        table.add_row(f"{row.label}: {line.verdict}", *(number.replace(" [", "\n[", 1) for number in numbers))
    return table


@app.command()
def report(
    run_dirs: Annotated[
        list[Path] | None, typer.Argument(parser=expand_home, help="one or more runs that notebook 06 has compared")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=expand_home,
            metavar="<path>",
            help="the HTML file, such as runs/demo-and-lr.html; needed for several runs; by default the run's report.html",
        ),
    ] = None,
) -> None:
    """Write the HTML report again. With several runs, write a report that compares them side by side."""
    from medcot_utils.evaluation.report import build_report
    from medcot_utils.run.directory import Run
    from medcot_utils.run.files import write_atomic
    from medcot_utils.run.lock import hold

    run_dirs = run_dirs or [choose_run(None)]
    if out is None and len(run_dirs) > 1:
        raise MedcotError("a report of several runs needs its own file: name one, as in --out runs/demo-and-lr.html")
    runs = [Run.open(run_dir) for run_dir in run_dirs]
    if out is None:
        with hold(runs[0].path, "medcot report"):
            page = build_report(*runs)
            out = runs[0].write("report", page)
    else:
        page = build_report(*runs)
        write_atomic(out, page)
    say(f"{out} ({len(page.encode()) / 1e6:.1f} MB)")


@app.command()
def grade(
    run_dir: Annotated[
        Path | None, typer.Argument(parser=expand_home, help="a run whose base and tuned model have answered")
    ] = None,
    grader: Annotated[str, typer.Option(help="name of the person who judges")] = "grader",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the page; 0: any free port")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Serve a page on this machine for blind grading.

    You judge answers without knowing which model wrote them."""
    from medcot_utils.cli.grading_page import serve
    from medcot_utils.run.directory import Run

    serve(Run.open(choose_run(run_dir)), port, open_browser, grader)


app.command()(chat)


@app.command()
def doctor(run_dir: RunDir = None) -> None:
    """Show which profiles this machine can run.

    For each, it says what memory and disk it needs, how long it takes, and how to start it."""
    from medcot_utils.cli import doctor
    from medcot_utils.cli.tables import times_table

    table = Table("profile", "can run here", "memory", "disk", "why not, or what to expect")
    found = doctor.profiles_here(run_dir or RUNS)
    first: dict[str, str] = {}  # {reason: the first profile that cannot run because of it}
    for line in found:
        disk = "" if line.disk_gib is None else f"{line.disk_gib:.1f} GiB"
        same = first.setdefault(line.reason, line.profile)
        why = line.reason if line.ok or same == line.profile else f"as {same}"
        table.add_row(line.profile, "yes" if line.ok else "no", f"{line.memory_gib:g} GiB", disk, why)
    console.print(table)
    if estimates := {line.profile: line.estimate for line in found if line.estimate}:
        console.print(times_table(estimates))
    for line in found:
        if line.ok:
            say(f"to run {line.profile}: medcot run --profile {line.profile}")


@app.command("settings")
def list_settings(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="only settings with this word in their name or meaning")
    ] = None,
    profile: Annotated[str, typer.Option(help=f"profile whose values are shown: {', '.join(PROFILES)} or auto")] = "demo",
) -> None:
    """List the settings for --set.

    It shows the value in a profile, the meaning, the choices, and the default of each."""
    from medcot_utils.cli.settings_table import settings_table
    from medcot_utils.config import load_config

    if profile == "auto":
        from medcot_utils.machine import hardware

        profile, line = hardware.resolve_profile(profile)
        say(line)
    console.print(settings_table(load_config(profile), words or []))


app.command("push")(push.push)


def _prepare_environment() -> None:
    from medcot_utils.machine import environment

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal shows a question mark for a character that it cannot show
    guard_streams()
    if left := environment.forget_process_group():
        typer.echo(environment.tell_forgotten(left), err=True)


def _refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise MedcotError for an argument that holds a secret: names and paths are written to files, and process lists show all.

    The values of --set and --parameter have their own checks, which name the setting."""
    option = ""
    for text in arguments:
        name, _, value = text.partition("=")
        option, value = (name, value) if text.startswith("--") else (option, text)
        if value and option not in ("--set", "--parameter", "-p") and (kind := kind_of(value, secrets_at_hand())):
            raise MedcotError(
                f"{option or 'an argument'} holds {kind}. Remove it: arguments are written to files, and others can see them. "
                f"A secret belongs in the environment or the platform's secret store"
            )
        option = text if text.startswith("-") and "=" not in text else ""


def main() -> None:
    """Run the command line.

    An error that the user can fix becomes one line and exit code 1. The exit code is EX_PAUSED for a paused training, and
    EX_INTERRUPTED after Ctrl-C in a series."""
    try:
        installing.require_linux()
        _prepare_environment()
        _refuse_secrets(sys.argv[1:])
        app()
    except SeriesPaused as pause:
        typer.echo(f"medcot: paused. {pause}")
        raise SystemExit(EX_PAUSED) from None
    except SeriesInterrupted as interruption:
        typer.echo(f"medcot: {interruption}", err=True)
        raise SystemExit(EX_INTERRUPTED) from None
    except MedcotError as error:
        PlainConsole(stderr=True).print(f"medcot: {error}", style="bold red", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
