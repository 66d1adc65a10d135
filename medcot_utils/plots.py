"""Make the figures of the series. Each function takes data and returns a matplotlib Figure; none is shown or saved here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The trainer's log: entries with a step and a loss or an eval_loss, as training_log.jsonl holds them.
LossLog = Sequence[Mapping[str, float]]
# An estimate as metrics.json holds it: value, low and high.
Bounds = Mapping[str, float | None]

# Okabe and Ito's palette: told apart with any color vision, in print too.
BASE, TUNED, GREY = "#999999", "#0072B2", "#444444"
ACCENT, MERGED, BASE_16BIT = "#D55E00", "#009E73", "#E69F00"


_WIDE, _NARROW = (7.0, 3.2), (4.2, 3.2)  # inches: of a notebook, and of a telephone


def _figure(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = _WIDE) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _points(log: LossLog, key: str) -> Iterable[tuple[float, ...]]:
    """Return (steps, losses) of the entries that have this loss; nothing if none has."""
    return zip(*((entry["step"], float(entry[key])) for entry in log if key in entry), strict=True)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def loss_figure(log: LossLog, before: float | None = None, narrow: bool = False) -> Figure:
    """Draw the training loss over optimizer steps, and the held-out loss if the log has it. Loss in nats per token.

    Args:
        log: the trainer's log.
        before: the base's loss on the held-out rows of the log, which then stands at step 0.
        narrow: for a telephone."""
    size = _NARROW if narrow else _WIDE
    figure, axes = _figure("Loss during fine-tuning", "optimizer step", "loss (nats per token)", size)
    if trained := [*_points(log, "loss")]:
        axes.plot(*trained, color=TUNED, marker="o", markersize=3.5, label="training rows")
    first: LossLog = [] if before is None else [{"step": 0, "eval_loss": before}]
    if held_out := [*_points([*first, *log], "eval_loss")]:
        axes.plot(*held_out, color=ACCENT, marker="s", markersize=5, linestyle="--", label="held-out rows")
    if trained or held_out:
        axes.legend(frameon=False)
    else:
        _say(axes, "no loss was logged")
    return figure


def band_figure(bounds: Mapping[int, tuple[float, float]], log: LossLog) -> Figure:
    """Draw a run's training loss over the band of the public T4 runs. Loss in nats per token.

    `bounds`: {optimizer step: (lowest, highest loss)}."""
    figure, axes = _figure("This run and public runs of the recipe", "optimizer step", "loss (nats per token)")
    low, high = zip(*bounds.values(), strict=True)
    axes.fill_between([*bounds], low, high, color=BASE, alpha=0.35, linewidth=0, label="public T4 runs")
    axes.plot(*_points(log, "loss"), color=TUNED, marker="o", markersize=3.5, label="this run")
    axes.legend(frameon=False)
    return figure


def length_figure(tokens: Sequence[int], limit: int) -> Figure:
    """Draw a histogram of row lengths in tokens, with the cut-off if it is near."""
    figure, axes = _figure("Length of the training rows", "tokens per row", "rows")
    axes.hist(tokens, bins=min(30, max(5, len(set(tokens)))), color=TUNED, edgecolor="white", linewidth=0.5)
    if max(tokens) > 0.6 * limit:
        axes.axvline(limit, color=ACCENT, linestyle="--", label=f"max_seq_length = {limit}")
        axes.legend(frameon=False)
    return figure


# --- the comparison --------------------------------------------------------------------------------------------------

_AT_LEAST = "≥"
_MODELS = {"base": ("base", BASE), "tuned": ("tuned", TUNED), "merged": ("merged", MERGED)}
_FORM = {
    "closed_think_rate": "close their\nthinking",
    "finished_rate": "end by\nthemselves",
    "bullet_rate": "are a list",
    "one_paragraph_rate": "are one\nparagraph",
}
_READINGS = {
    "mcq_accuracy": ("strict", "read\nstrictly"),
    "mcq_letter": ("letter", "by letter"),
    "mcq_likelihood": ("likelihood", "by\nlikelihood"),
}


@dataclass(frozen=True)
class _Group:
    """The bars over one label, by model. at_least: the models whose number is a lower bound. chance: what guessing gives."""

    label: str
    bars: Mapping[str, Bounds]
    at_least: Collection[str] = ()
    chance: float | None = None


def comparison_figure(measured: Mapping[str, Any], merged: Mapping[str, Any] | None = None, narrow: bool = False) -> Figure:
    """Draw everything that was compared, each bar with its interval: loss, form, likeness, lengths and multiple choice.

    Answers are shown as the models give them by themselves and, beside that, with forced closing. A metric that was not
    measured is left out, and so is a bar that would have no finite height.

    Args:
        measured: the content of metrics.json.
        merged: the content of merged_metrics.json; the merged model gets a bar beside the others'.
        narrow: for a telephone, one panel below the other."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(_NARROW[0], 13.5) if narrow else (10.0, 6.8), layout="constrained", dpi=110)
    loss, form, likeness, length, readings = figure.subplots(5, 1) if narrow else _subplots_in_two_rows(figure)
    _draw_losses(loss, measured, merged or {})
    asked = f", {measured['n_questions']} questions" if "n_questions" in measured else ""
    _draw_groups(form, f"Form{asked}: answers that …", "share", _groups(measured, merged or {}, _FORM))
    both = [
        group
        for name, label in {"rouge_l": "ROUGE-L", "chrf": "chrF"}.items()
        for group in _natural_and_forced(measured, merged or {}, name, label)
    ]
    _draw_groups(likeness, "Likeness to the reference answer", "likeness, 0 to 1", both)
    lengths = _groups(measured, merged or {}, {"thinking_tokens": "thinking"})
    lengths += _natural_and_forced(measured, merged or {}, "answer_tokens", "answer")
    unit = f"tokens ({_AT_LEAST}: cut, so at least)" if any(group.at_least for group in lengths) else "tokens"
    _draw_groups(length, "Length", unit, lengths)
    choices = _reading_groups(measured)
    _draw_groups(readings, "Multiple choice", "share right", choices)
    shown = [model for model in _MODELS if model != "merged" or merged]
    handles: list[Artist] = [Patch(color=_MODELS[model][1], label=_MODELS[model][0]) for model in shown]
    if any(group.chance is not None for group in choices):
        handles.append(Line2D([], [], color=ACCENT, linestyle="--", label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    for axes in figure.axes if narrow else ():
        axes.title.set_fontsize(10)
    title = "The effects of fine-tuning, on held-out rows and questions"
    figure.suptitle(title.replace(", ", ",\n") if narrow else title, fontsize=13)
    return figure


def _subplots_in_two_rows(figure: Figure) -> list[Axes]:
    rows = figure.subfigures(2, 1, hspace=0.03)
    return [*rows[0].subplots(1, 2, width_ratios=[1, 1.9]), *rows[1].subplots(1, 3, width_ratios=[1.4, 1.3, 1.2])]


def loss_bars_figure(measured: Mapping[str, Any], merged: Mapping[str, Any] | None = None) -> Figure:
    """Draw the held-out loss of every model that has one, in nats per token: 16-bit base, base, tuned, and merged model.

    The arguments are those of `comparison_figure`."""
    figure, axes = _figure("", "", "")
    _draw_losses(axes, measured, merged or {})
    return figure


def _draw_losses(axes: Axes, measured: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    found = {"16-bit\nbase": (measured["losses"]["base_16bit"], BASE_16BIT)} if "losses" in measured else {}
    if loss := measured["metrics"].get("eval_loss"):
        found |= {"4-bit\nbase" if found else "base": (loss["base"], BASE), "tuned": (loss["tuned"], TUNED)}
    if loss := merged.get("metrics", {}).get("eval_loss"):
        found["merged"] = (loss["tuned"], MERGED)
    for place, (estimate, color) in enumerate(found.values()):
        _draw_bar(axes, place, 0.7, estimate, color, f"{estimate['value']:.2f}")
    _label(axes, "Held-out loss", "nats per token", list(found))


def _draw_groups(axes: Axes, title: str, unit: str, groups: Sequence[_Group]) -> None:
    models = [model for model in _MODELS if any(model in group.bars for group in groups)]
    width = 0.8 / max(len(models), 1)
    for index, group in enumerate(groups):
        for model, estimate in group.bars.items():
            place = index + (models.index(model) - (len(models) - 1) / 2) * width
            _draw_bar(axes, place, 0.94 * width, estimate, _MODELS[model][1], _AT_LEAST * (model in group.at_least))
        if group.chance is not None:
            axes.hlines(group.chance, index - 0.5, index + 0.5, color=ACCENT, linestyle="--", linewidth=1.2)
    _label(axes, title, unit, [group.label for group in groups])


def _draw_bar(axes: Axes, place: float, width: float, estimate: Bounds, color: str, text: str = "") -> None:
    value = estimate["value"]
    if value is None or not math.isfinite(value):
        return
    # Without an interval the bar has none: it ends where the value is.
    low, high = (value if estimate[end] is None else estimate[end] for end in ("low", "high"))
    axes.bar(place, value, width, color=color)
    axes.errorbar(place, value, yerr=[[abs(value - low)], [abs(high - value)]], fmt="none", ecolor=GREY, capsize=3, linewidth=1)
    # A bound's mark is large, or it looks like a part of the interval below it.
    size = 14 if text == _AT_LEAST else None
    axes.annotate(text, (place, max(value, high)), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=size)


def _label(axes: Axes, title: str, unit: str, labels: Sequence[str]) -> None:
    if not axes.patches:
        _say(axes, "none measured")
    # They hold numbers of the run's files, and matplotlib would take what stands between dollar signs for a formula.
    axes.set_title(title, parse_math=False)
    axes.set_xticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylabel(unit)
    axes.set_xlim(-0.5, max(len(labels), 1) - 0.5)
    axes.set_ylim(0, 1.04 if unit.startswith("share") else 1.12 * axes.get_ylim()[1])
    axes.tick_params(axis="x", labelsize=9, length=0)
    _tidy(axes)


def _groups(
    measured: Mapping[str, Any], merged: Mapping[str, Any], labels: Mapping[str, str], reading: str = "metrics"
) -> list[_Group]:
    """Return a group for every metric of a reading (`metrics`: by themselves; `forced`) that was measured."""
    found = []
    for name, label in labels.items():
        if metric := (measured.get(reading) or {}).get(name):
            others = (merged.get(reading) or {}).get(name)
            bars = {"base": metric["base"], "tuned": metric["tuned"]} | ({"merged": others["tuned"]} if others else {})
            cut = metric.get("cut", {})
            found.append(_Group(label, bars, at_least=[model for model in bars if cut.get(model)]))
    return found


def _natural_and_forced(measured: Mapping[str, Any], merged: Mapping[str, Any], name: str, label: str) -> list[_Group]:
    if not measured.get("forced"):
        return _groups(measured, merged, {name: label})
    forced = _groups(measured, merged, {name: f"{label},\nforced"}, "forced")
    return _groups(measured, merged, {name: f"{label},\nby itself"}) + forced


def _reading_groups(measured: Mapping[str, Any]) -> list[_Group]:
    """Return a group for every reading of multiple choice, over all tasks, with what guessing would give."""
    groups = []
    for name, (reading, label) in _READINGS.items():
        lines = [line for line in measured.get("mcq_readings") or [] if line["reading"] == reading]
        chance = sum(line["n"] * line["chance"] for line in lines) / sum(line["n"] for line in lines) if lines else None
        for group in _groups(measured, {}, {name: label}):
            groups.append(replace(group, label=f"{label}\nn = {group.bars['base'].get('n')}", chance=chance))
    return groups


def describe_figure(figure: Figure) -> str:
    """Return a figure's alt text: what each of its panels shows, in the order of the titles, units and labels."""
    said = [figure.get_suptitle()]
    for axes in figure.axes:
        units = " over ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        said.append(": ".join(filter(None, (axes.get_title(), units))))
    return ". ".join(filter(None, said))


def to_data_uri(figure: Figure) -> str:
    """Return the figure as a `data:image/png;base64,` address, for pages that must open without a network."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
