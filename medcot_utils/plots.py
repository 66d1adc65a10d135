"""Figures of the series. Each function takes data and gives a matplotlib Figure; nothing is shown or saved here."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, in print too.
BASE, TUNED, GREY = "#999999", "#0072B2", "#444444"
ACCENT = "#D55E00"


def _figure(width: float = 7.0, height: float = 3.2, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.subplots(1, columns)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def loss_figure(log_history: Sequence[dict[str, Any]]) -> Figure:
    """Training loss over optimizer steps, and the held-out loss where it was taken. Loss in nats per token."""
    figure, axes = _figure()
    train = [(entry["step"], float(entry["loss"])) for entry in log_history if "loss" in entry]
    held_out = [(entry["step"], float(entry["eval_loss"])) for entry in log_history if "eval_loss" in entry]
    axes.plot(*zip(*train, strict=True), color=TUNED, marker="o", markersize=3.5, label="training rows")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ACCENT, marker="s", markersize=5, linestyle="--", label="held-out rows")
    axes.set(title="Loss during fine-tuning", xlabel="optimizer step", ylabel="loss (nats per token)")
    _tidy(axes)
    axes.legend(frameon=False)
    return figure


def band_figure(bounds: dict[int, tuple[float, float]], log_history: Sequence[dict[str, Any]]) -> Figure:
    """A run's training loss at its logged steps over the band of the public T4 runs. Loss in nats per token."""
    figure, axes = _figure()
    steps = list(bounds)
    low, high = zip(*bounds.values(), strict=True)
    axes.fill_between(steps, low, high, color=BASE, alpha=0.35, linewidth=0, label="public T4 runs")
    train = [(entry["step"], float(entry["loss"])) for entry in log_history if "loss" in entry]
    axes.plot(*zip(*train, strict=True), color=TUNED, marker="o", markersize=3.5, label="this run")
    axes.set(title="This run and public runs of the recipe", xlabel="optimizer step", ylabel="loss (nats per token)")
    _tidy(axes)
    axes.legend(frameon=False)
    return figure


def length_figure(tokens: Sequence[int], limit: int) -> Figure:
    """Histogram of row lengths in tokens, with the cut-off."""
    figure, axes = _figure()
    axes.hist(tokens, bins=min(30, max(5, len(set(tokens)))), color=TUNED, edgecolor="white", linewidth=0.5)
    if max(tokens) > 0.6 * limit:
        axes.axvline(limit, color=ACCENT, linestyle="--", label=f"max_seq_length = {limit}")
        axes.legend(frameon=False)
    axes.set(title="Length of the training rows", xlabel="tokens per row", ylabel="rows")
    _tidy(axes)
    return figure


def comparison_figure(metrics: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Base and tuned side by side with their intervals: loss, the three rates and ROUGE-L, lengths."""
    panels = [
        ("Held-out loss", "nats per token", {"eval_loss": "loss"}),
        (
            "Format and similarity",
            "share, or F1",
            {"closed_think_rate": "closes\n</think>", "finished_rate": "ends", "bullet_rate": "list", "rouge_l": "ROUGE-L"},
        ),
        ("Length", "tokens", {"thinking_tokens": "thinking", "answer_tokens": "answer"}),
    ]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.4), layout="constrained", dpi=110)
    widths = [1, 2.6, 1.5]
    for axes, (title, unit, names) in zip(figure.subplots(1, 3, width_ratios=widths), panels, strict=True):
        for offset, side, colour in ((-0.2, "base", BASE), (0.2, "tuned", TUNED)):
            entries = [metrics[name][side] for name in names]
            values = [entry["value"] for entry in entries]
            low = [entry["value"] - (entry["value"] if entry["low"] is None else entry["low"]) for entry in entries]
            high = [(entry["value"] if entry["high"] is None else entry["high"]) - entry["value"] for entry in entries]
            places = [index + offset for index in range(len(values))]
            axes.bar(places, values, 0.38, color=colour, label=side)
            axes.errorbar(places, values, yerr=[low, high], fmt="none", ecolor=GREY, capsize=3, linewidth=1)
        axes.set(title=title, ylabel=unit, xticks=range(len(names)), xticklabels=list(names.values()))
        axes.set_ylim(bottom=0)
        _tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def to_data_uri(figure: Figure) -> str:
    """The figure as a `data:image/png;base64,` address, for pages that must open without a network."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
