"""The comparison as one self-contained HTML file, made from run directories alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils import plots
from medcot_utils.config import RunConfig, setting_names, show_value
from medcot_utils.evaluation.claims import CANNOT_TELL
from medcot_utils.evaluation.comparison import LABELS, MetricLine, metric_lines
from medcot_utils.evaluation.grades import describe_grades, summarize_grades
from medcot_utils.evaluation.intervals import format_interval
from medcot_utils.evaluation.loss import describe_share
from medcot_utils.evaluation.merged import LABELS as MERGED_LABELS
from medcot_utils.evaluation.merged_column import describe_merged, read_merged
from medcot_utils.evaluation.metrics import METRICS, Metric
from medcot_utils.evaluation.side_by_side import (
    Key,
    ShownRun,
    anchors_of,
    columns_of,
    listed,
    read_run,
    show_question,
)
from medcot_utils.evaluation.tuned_models import compare_tuned
from medcot_utils.models.embedded import warn_of_random_weights
from medcot_utils.models.losses import mean_loss
from medcot_utils.plain_text import keep_intervals, say, show_controls
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.lock import RunError
from medcot_utils.run.shapes import Entries, describe_missing

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from medcot_utils.data.tokens import DataReport
    from medcot_utils.evaluation.claims import ClaimVerdict
    from medcot_utils.evaluation.comparison import Metrics
    from medcot_utils.evaluation.measured import Measured
    from medcot_utils.evaluation.merged import MergedMeasured
    from medcot_utils.run.directory import Run

# Sections of settings in which runs may differ. Those that change how answers are made and judged come first.
_SECTIONS = ("seed", "generation", "evaluation", "prompt", "model", "dataset", "lora", "training", "profile")


def build_report(*runs: Run) -> str:
    """Return HTML with the claims, metrics, and figures of each run, and every question with all answers side by side.

    For several runs, the page also shows what differs between them, and compares their tuned models on the questions that all
    runs scored. The template escapes model text. Raises RunError if an artifact that it reads is missing."""
    from markupsafe import Markup

    def show(value: object) -> str:
        return value if isinstance(value, Markup) else show_controls(str(value))  # which the template escapes

    environment = make_environment(Path(__file__).parent, autoescape=True, finalize=show)
    environment.filters["keep_intervals"] = keep_intervals
    shown = [read_run(run, name) for run, name in zip(runs, _names([run.path for run in runs]), strict=True)]
    columns = columns_of(shown)
    anchors = anchors_of(shown)
    questions = [show_question(key, anchor, shown, columns) for key, anchor in anchors.items()]
    several = len(runs) > 1
    tuned = compare_tuned(shown, _percent(runs[0])) if several else None
    if tuned and tuned.why_not:
        say(f"the tuned models are not compared: {tuned.why_not}")
    labels = [column.label for column in columns]
    return environment.get_template("report.html.j2").render(
        title=f"runs {listed(one.name for one in shown)}" if several else f"{', '.join(labels[:-1])} and {labels[-1]}",
        runs=[_run_section(one, several, anchors) for one in shown],
        names=[one.name for one in shown],
        names_of=METRICS,
        interval=format_interval,
        differences=_differences(shown) if several else {},
        tuned=tuned,
        questions=questions,
        # A data set may number its specialties.
        specialties=sorted({str(one.question["specialty"]) for one in questions} - {""}),
        outcomes=sorted({one.outcome for one in questions}),
    )


def make_environment(folder: Path, **options: Any) -> Environment:
    """Return the Jinja environment of a folder's templates. A template that uses an entry a run's file lacks raises RunError."""
    from jinja2 import Environment, FileSystemLoader, Undefined

    class Missing(Undefined):
        def __init__(self, hint: str | None = None, obj: Any = None, name: Any = None, exc: type[Exception] = RunError) -> None:
            super().__init__(describe_missing(obj, name) if isinstance(obj, Entries) else hint, obj, name, RunError)

    return Environment(loader=FileSystemLoader(folder), undefined=Missing, **options)


def _percent(run: Run) -> str:
    """Return the run's evaluation.confidence_level as text, in percent: `95`."""
    return f"{100 * run.config.evaluation.confidence_level:g}"


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a unique name for each run: its folder's name, with as many parent folders as are needed.

    If a folder is given twice, the second name ends in a number."""
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        depths = range(1, len(own) + 1)
        depth = next((n for n in depths if all(other[-n:] != own[-n:] for other in others)), 1)
        name = "/".join(own[-depth:])
        numbered = (f"{name} ({n})" for n in itertools.count(2))
        names.append(name if name not in names else next(one for one in numbered if one not in names))
    return names


# --- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """Hold one metric of a table in both readings: base against tuned, then tuned against merged. None: not measured."""

    metric: Metric
    natural: MetricLine | None
    forced: MetricLine | None
    merged: MetricLine | None
    merged_forced: MetricLine | None


@dataclass(frozen=True)
class _LossBar:
    """Hold a line on the held-out loss: that of a model, or a difference and its meaning."""

    text: str
    value: str


@dataclass(frozen=True)
class _Drawn:
    """Hold a figure as data URIs, for a wide page and for a phone."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class _RunSection:
    """Hold what the page shows of one run. tables: {title: rows}.

    stale: see `_describe_stale`. random: see `warn_of_random_weights`. decided: the claims that hold or do not hold; undecided:
    the others. merged_line: the text of `describe_merged`."""

    title: str
    stale: str
    random: str
    config: RunConfig
    confidence: str
    plan: Mapping[str, object]
    measured: Measured
    merged: MergedMeasured | None
    merged_line: str
    decided: Sequence[ClaimVerdict]
    undecided: Sequence[ClaimVerdict]
    losses: Sequence[_LossBar]
    tables: Mapping[str, Sequence[_Row]]
    notes: Sequence[str]
    comparison: _Drawn
    loss: _Drawn
    data: DataReport
    anchors: Mapping[str, str]  # {question id: what it is linked by}


def _run_section(shown: ShownRun, named: bool, anchors: Mapping[Key, str]) -> _RunSection:
    run = shown.run
    measured: Measured = run.read("metrics")
    merged = read_merged(run)
    graded = summarize_grades(run)
    open_claims = [claim for claim in measured["claims"] if claim["verdict"].startswith(CANNOT_TELL)]
    return _RunSection(
        title=f"Run {shown.name}" if named else "The effects of fine-tuning",
        stale=_describe_stale(shown, named),
        random=warn_of_random_weights(run.config.model.name),
        config=run.config,
        confidence=_percent(run),
        plan=run.read("plan"),
        measured=measured,
        merged=merged,
        merged_line=describe_merged(run),
        decided=[claim for claim in measured["claims"] if claim not in open_claims],
        undecided=open_claims,
        losses=_loss_bars(measured),
        tables=_tables(measured, merged),
        notes=[*measured["notes"], *(describe_grades(graded).splitlines() if graded else [])],
        comparison=_draw(plots.comparison_figure, measured, merged),
        loss=_draw(plots.loss_figure, run.read("training_log"), _loss_before_training(run)),
        data=shown.data_report,
        anchors={key[0]: anchors[key] for key in shown.questions},
    )


def _describe_stale(shown: ShownRun, named: bool) -> str:
    """Say that what the page shows was made with other settings or inputs than the run has now; an empty text if it was not."""
    run = shown.run
    steps = {run.step_to_redo(name) for name in (*ARTIFACTS["report"].inputs, "held_out_loss")} - {None}
    if not steps:
        return ""
    which = f"Run {shown.name} is stale" if named else "This run is stale"
    return f"{which}: its settings or inputs changed after these results. Run notebook {min(steps)}, and those after it."


def _loss_before_training(run: Run) -> float | None:
    """Return the base's loss, in nats per token, on the rows on which the trainer measured the held-out loss."""
    base = [record for record in run.read("held_out_loss") if record["model"] == "base"]
    return mean_loss(base[: run.config.training.eval_rows]) if base else None


def _draw(figure: Callable[..., Figure], *data: object) -> _Drawn:
    return _Drawn(*(plots.to_data_uri(figure(*data, narrow=narrow)) for narrow in (False, True)))


def _tables(measured: Measured, merged: MergedMeasured | None) -> dict[str, list[_Row]]:
    answered, apart = measured["n_answered"], measured["n_contaminated"]
    # {title: (as they answer, with forced closing, then the merged model in both readings)}
    titled: dict[str, tuple[Metrics | None, ...]] = {
        f"greedy answers, {measured['n_questions']} questions": (
            *(measured["metrics"], measured.get("forced")),
            *((merged["metrics"], merged.get("forced")) if merged else ()),
        ),
        f"sampled answers, {measured['n_samples']} a question, each question by its mean": (
            measured["sampled"],
            measured.get("sampled_forced"),
        ),
        f"greedy answers, the {answered} questions that both models answered in full form": (measured["answered"],),
        f"{apart} questions that training rows repeat, apart from all other figures": (measured["contaminated"],),
    }
    return {title: rows for title, readings in titled.items() if (rows := _rows(*readings))}


def _rows(*readings: Metrics | None) -> list[_Row]:
    labels = (LABELS, LABELS, MERGED_LABELS, MERGED_LABELS)
    lines = [metric_lines(metrics, names) for metrics, names in zip(readings, labels, strict=False)]
    lines += [{}] * (4 - len(lines))
    return [_Row(METRICS[name], *(of.get(name) for of in lines)) for name in METRICS if any(name in of for of in lines[:2])]


def _loss_bars(measured: Measured) -> list[_LossBar]:
    """Return the losses of 16-bit base, 4-bit base, and tuned model, and their differences; nothing without the 16-bit base's."""
    if "losses" not in measured:
        return []
    losses = measured["losses"]
    return [
        _LossBar("16-bit base", format_interval(losses["base_16bit"])),
        _LossBar("4-bit base, which the adapter was trained on", format_interval(losses["base"])),
        _LossBar("tuned", format_interval(losses["tuned"])),
        _LossBar("what rounding the base to 4 bits cost", format_interval(losses["rounding"])),
        _LossBar("tuned against the 16-bit base: what was learned beyond that", format_interval(losses["learning"])),
        _LossBar("share of the whole fall that only makes up for rounding", describe_share(losses)),
    ]


# --- several runs --------------------------------------------------------------------------------------------------


def _differences(shown: Sequence[ShownRun]) -> dict[str, list[str]]:
    """Return what differs between the runs, with its value in every run: the questions they asked, then settings."""
    common = set.intersection(*(set(one.questions) for one in shown))
    found = {}
    if any(set(one.questions) != common for one in shown):
        apart = [len(set(one.questions) - common) for one in shown]
        found["questions"] = [
            f"{len(one.questions)} asked, {f'{only} of them not' if only else 'all'} in all runs"
            for one, only in zip(shown, apart, strict=True)
        ]
    for name in (name for section in _SECTIONS for name in setting_names() if name.split(".")[0] == section):
        values = [one.run.config.get(name) for one in shown]
        if any(value != values[0] for value in values):
            found[name] = [_format_setting(value) for value in values]
    return found


def _format_setting(value: object) -> str:
    """Return a setting's value as text; of an absolute path, only the last part."""
    return f"…/{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else show_value(value)
