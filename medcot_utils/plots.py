"""Make the figures of the series. Each function takes data and returns a matplotlib Figure; none is shown or saved here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The trainer's log: entries with a step and a loss or an eval_loss, as training_log.jsonl holds them.
LossLog = Sequence[Mapping[str, float]]
# {metric: {base, tuned: an estimate with value, low and high}}, as metrics.json holds them.
Metrics = Mapping[str, Mapping[str, Mapping[str, float | None]]]

# Okabe and Ito's palette: told apart with any color vision, in print too.
BASE, TUNED, GREY = "#999999", "#0072B2", "#444444"
ACCENT = "#D55E00"


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.2), layout="constrained", dpi=110)
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


def loss_figure(log: LossLog) -> Figure:
    """Draw the training loss over optimizer steps, and the held-out loss if the log has it. Loss in nats per token."""
    figure, axes = _figure("Loss during fine-tuning", "optimizer step", "loss (nats per token)")
    if trained := [*_points(log, "loss")]:
        axes.plot(*trained, color=TUNED, marker="o", markersize=3.5, label="training rows")
    if held_out := [*_points(log, "eval_loss")]:
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


# Title, unit, and the metrics with their labels.
_PANELS = (
    ("Held-out loss", "nats per token", {"eval_loss": "loss"}),
    (
        "Format and similarity",
        "share, or F1",
        {"closed_think_rate": "closes\n</think>", "finished_rate": "ends", "bullet_rate": "list", "rouge_l": "ROUGE-L"},
    ),
    ("Length", "tokens", {"thinking_tokens": "thinking", "answer_tokens": "answer"}),
)


def comparison_figure(metrics: Metrics) -> Figure:
    """Draw base and tuned side by side with their intervals: loss, the three rates and ROUGE-L, lengths.

    A metric that was not measured is left out, and so is a bar that would have no finite height."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.2, 3.4), layout="constrained", dpi=110)
    sides = ((-0.2, "base", BASE), (0.2, "tuned", TUNED))
    for axes, (title, unit, labels) in zip(figure.subplots(1, 3, width_ratios=[1, 2.6, 1.5]), _PANELS, strict=True):
        names = [name for name in labels if name in metrics]
        for offset, side, color in sides:
            drawn = [index for index, name in enumerate(names) if math.isfinite(metrics[name][side]["value"])]
            estimates = [metrics[names[index]][side] for index in drawn]
            values = [estimate["value"] for estimate in estimates]
            # Without an interval the bar has none: it ends where the value is.
            low, high = (
                [abs(one["value"] - (one["value"] if one[end] is None else one[end])) for one in estimates]
                for end in ("low", "high")
            )
            places = [index + offset for index in drawn]
            axes.bar(places, values, 0.38, color=color)
            axes.errorbar(places, values, yerr=[low, high], fmt="none", ecolor=GREY, capsize=3, linewidth=1)
        if not axes.patches:
            _say(axes, "none measured")
        axes.set(title=title, ylabel=unit, xticks=range(len(names)), xticklabels=[labels[name] for name in names])
        axes.set_ylim(bottom=0)
        _tidy(axes)
    handles = [Patch(color=color, label=side) for _, side, color in sides]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def to_data_uri(figure: Figure) -> str:
    """Return the figure as a `data:image/png;base64,` address, for pages that must open without a network."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
