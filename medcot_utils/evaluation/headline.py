"""The metrics that the README, `medcot run`, and `medcot status` show: which ones, in which reading, and under which names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot_utils.evaluation.comparison import BY_THEMSELVES, FORCED, ComparedMetric
from medcot_utils.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from medcot_utils.evaluation.comparison import Metrics
    from medcot_utils.evaluation.measured import Measured
    from medcot_utils.evaluation.merged import MergedMeasured

# A model that never closes its thinking has no answer to compare, so these are shown with forced closing if it was measured.
OF_ANSWERS = ("rouge_l", "chrf")
HEADLINE = ("eval_loss", "closed_think_rate", "finished_rate", *OF_ANSWERS, "mcq_letter", "mcq_likelihood")


@dataclass(frozen=True)
class HeadlineRow:
    """Hold one metric of the README's table. reading: how answers were read. merged: from tuned to merged; None: not measured."""

    name: str
    reading: str
    label: str
    compared: ComparedMetric
    merged: ComparedMetric | None


def headline_rows(measured: Measured, merged: MergedMeasured | None = None) -> list[HeadlineRow]:
    """Return the headline metrics that were measured, in order."""
    forced = measured.get("forced") or {}
    merged_natural: Metrics = merged["metrics"] if merged else {}
    merged_forced: Metrics = merged.get("forced", {}) if merged else {}
    rows = []
    for name in HEADLINE:
        closed = name in OF_ANSWERS and name in forced
        metrics, others = (forced, merged_forced) if closed else (measured["metrics"], merged_natural)
        if name in metrics:
            label = with_forced_closing(METRICS[name].label) if closed else METRICS[name].label + _describe_mcq(name, measured)
            rows.append(HeadlineRow(name, FORCED if closed else BY_THEMSELVES, label, metrics[name], others.get(name)))
    return rows


def with_forced_closing(name: str) -> str:
    """Return the name of a metric that was measured with forced closing."""
    return f"{name}, with forced closing"


def _describe_mcq(name: str, measured: Measured) -> str:
    """Return text such as `, 60 questions, chance 0.25` for multiple choice; an empty text for other metrics."""
    reading = name.removeprefix("mcq_")
    lines = [line for line in measured.get("mcq_readings", []) if line["reading"] == reading]
    if reading == name or not lines:
        return ""
    n = sum(line["n"] for line in lines)
    chance = sum(line["n"] * line["chance"] for line in lines) / n
    return f", {n:,} questions, chance {chance:.2f}"
