"""One metric of two models on the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NotRequired

import numpy as np
from pydantic import AfterValidator
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import EvaluationSettings
from medcot_utils.evaluation.intervals import (
    Array,
    Difference,
    Estimate,
    Statistic,
    estimate_all,
    estimate_share,
    estimate_share_difference,
    questions_needed,
)
from medcot_utils.evaluation.metrics import METRICS


def _require_known(name: str) -> str:
    if name not in METRICS:
        raise ValueError("expected the name of a metric of this version")
    return name


MetricName = Annotated[str, AfterValidator(_require_known)]  # where a run is read


class CutLengths(TypedDict):
    """Hold how many of each model's `answers` a token budget cut. The length of a cut answer is a lower bound."""

    base: int
    tuned: int
    answers: int


class ComparedMetric(TypedDict):
    """Hold one metric of two models on the same questions. The difference is tuned minus base, paired.

    cut: for a length, if an answer was cut. Then that model's mean is a lower bound."""

    base: Estimate
    tuned: Estimate
    difference: Difference
    cut: NotRequired[CutLengths]


# {name of the metric, a key of METRICS: both models' values}
Metrics = Mapping[MetricName, ComparedMetric]


def compare_shares(base: Array, tuned: Array, settings: EvaluationSettings) -> ComparedMetric:
    """Compare two columns of ones and zeros over the same questions."""
    level = settings.confidence_level
    difference = estimate_share_difference(base, tuned, settings)
    return {"base": estimate_share(base, level), "tuned": estimate_share(tuned, level), "difference": difference}


def compare_statistics(
    base: Statistic, tuned: Statistic, changes: Array, settings: EvaluationSettings, seed: int
) -> ComparedMetric:
    """Compare a statistic of both models, with bootstrap intervals.

    Args:
        changes: tuned minus base, one value per question; its standard deviation gives `needed`."""
    n = len(changes)
    statistics = [base, tuned, lambda drawn: tuned(drawn) - base(drawn)]
    of_base, of_tuned, difference = estimate_all(statistics, n, settings, seed)
    with np.errstate(all="ignore"):
        spread = float(np.std(changes, ddof=1)) if n > 1 else 0.0
    needed = questions_needed(spread, difference["value"], settings.confidence_level)
    return {"base": of_base, "tuned": of_tuned, "difference": {**difference, "spread": spread, "needed": needed}}
