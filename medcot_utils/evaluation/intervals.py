"""Intervals, exact tests and numbers of questions, for one model and for two that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medcot_utils.config import EvaluationSettings

Array = np.ndarray
FEWEST_QUESTIONS = 6
# Beyond this many questions the normal approximation of an exact test's power is as good.
_EXACT_POWER_UP_TO = 5000


# --- means and ratios ------------------------------------------------------------------------------------------------


def interval(
    statistic: Callable[..., Array], columns: Sequence[Array], settings: EvaluationSettings, seed: int
) -> dict[str, Any]:
    """{value, low, high, n}: a statistic over paired per-question columns and its bootstrap interval.

    Questions are resampled whole, so both models' answers to one question stay together (scipy.stats.bootstrap, paired).
    The percentiles are the expanded ones of Hesterberg 2015 ("What Teachers Should Know About the Bootstrap",
    doi:10.1080/00031305.2015.1089789), which make the plain percentile interval, too narrow for few questions, as wide as
    Student's. `statistic` takes the columns and an `axis`. low and high are None for a single question."""
    from scipy.stats import bootstrap

    n, value = len(columns[0]), float(statistic(*columns, axis=-1))
    if n < 2:
        return {"value": value, "low": None, "high": None, "n": n}
    found = bootstrap(
        tuple(columns),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=settings.n_resamples,
        confidence_level=_expanded(settings.confidence_level, n),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"value": value, "low": float(found.low), "high": float(found.high), "n": n}


def _expanded(level: float, n: int) -> float:
    from scipy.stats import norm, t

    return min(1 - 2 * norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.5 + level / 2, n - 1)), 1 - 1e-9)


def questions_needed(spread: float, difference: float, confidence_level: float = 0.95, power: float = 0.8) -> int | None:
    """How many questions a paired comparison needs to show a mean difference of this size with this power, by the normal
    approximation: ((z_confidence + z_power) x spread / difference)^2, `spread` being the standard deviation of the
    difference between questions; at least FEWEST_QUESTIONS. None where nothing differs.

    Source: any textbook's sample size of a paired test, e.g. Chow, Shao and Wang, "Sample Size Calculations in Clinical
    Research", 3.1."""
    from scipy.stats import norm

    if difference == 0 or spread == 0:
        return None
    z = norm.ppf(0.5 + confidence_level / 2) + norm.ppf(power)
    return max(FEWEST_QUESTIONS, math.ceil((z * spread / difference) ** 2))


# --- shares of yes and no --------------------------------------------------------------------------------------------


def rate(values: Array, confidence_level: float) -> dict[str, Any]:
    """{value, low, high, n}: the share of ones and Wilson's interval (1927, as in scipy), which keeps its level where the
    share is near 0 or 1 and the bootstrap has no width."""
    from scipy.stats import binomtest

    n = len(values)
    found = binomtest(int(sum(values)), n).proportion_ci(confidence_level, method="wilson")
    return {"value": float(np.mean(values)), "low": float(found.low), "high": float(found.high), "n": n}


def rate_difference(base: Array, tuned: Array, settings: EvaluationSettings) -> dict[str, Any]:
    """{value, low, high, n, p, alpha, changed, needed}: the tuned share minus the base's, over the same questions.

    low and high: Newcombe's interval for paired shares (1998, Statistics in Medicine 17:2635, method 10): Wilson's of both,
    joined through their correlation. p: McNemar's exact one, to be held against
    alpha. changed: the share of questions on which the two differ. needed: see `rate_questions_needed`."""
    n, level = len(base), settings.confidence_level
    before, after = rate(base, level), rate(tuned, level)
    both, neither = int((base * tuned).sum()), int(((1 - base) * (1 - tuned)).sum())
    only_base, only_tuned = int((base * (1 - tuned)).sum()), int(((1 - base) * tuned).sum())
    products = both * neither - only_base * only_tuned
    margins = (both + only_base) * (only_tuned + neither) * (both + only_tuned) * (only_base + neither)
    correlation = (max(products - n / 2, 0) if products > 0 else products) / math.sqrt(margins) if margins else 0.0

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0))

    value = after["value"] - before["value"]
    return {
        "value": value,
        "low": value - joined(after["value"] - after["low"], before["high"] - before["value"]),
        "high": value + joined(after["high"] - after["value"], before["value"] - before["low"]),
        "n": n,
        "p": exact_p(base, tuned),
        "alpha": round(1 - level, 6),
        "changed": (only_base + only_tuned) / n,
        "needed": rate_questions_needed((only_base + only_tuned) / n, value, level),
    }


def exact_p(base: Array, tuned: Array) -> float:
    """McNemar's exact two-sided p for yes-or-no answers to the same questions: of those on which the models differ, as
    many should go either way if nothing had changed (scipy.stats.binomtest); 1 where they differ on none."""
    from scipy.stats import binomtest

    only_base, only_tuned = int(((base == 1) & (tuned == 0)).sum()), int(((base == 0) & (tuned == 1)).sum())
    return float(binomtest(only_tuned, only_base + only_tuned).pvalue) if only_base + only_tuned else 1.0


def rate_questions_needed(changed: float, difference: float, confidence_level: float = 0.95, power: float = 0.8) -> int | None:
    """How many questions McNemar's exact test needs to show a difference of two shares with this power, where the models
    differ on the share `changed` of the questions: the test's own power, summed over how many may differ and how they may
    fall; the normal approximation beyond some thousands. At least FEWEST_QUESTIONS; None where nothing differs."""
    from scipy.stats import norm

    if difference == 0:
        return None
    changed = max(changed, abs(difference))
    z = norm.ppf(0.5 + confidence_level / 2) * math.sqrt(changed) + norm.ppf(power) * math.sqrt(changed - difference**2)
    n = max(FEWEST_QUESTIONS, math.ceil((z / difference) ** 2))
    while n <= _EXACT_POWER_UP_TO and exact_power(n, changed, difference, confidence_level) < power:
        n += max(1, n // 50)
    return n


def exact_power(n: int, changed: float, difference: float, confidence_level: float = 0.95) -> float:
    """How probably McNemar's exact test of `n` questions is clear, where the models differ on the share `changed` of all
    questions, and more in one direction than in the other by the share `difference`."""
    from scipy.stats import binom

    differ = np.arange(n + 1)
    share = (changed + abs(difference)) / (2 * changed)
    most = binom.ppf((1 - confidence_level) / 2, differ, 0.5) - 1  # so few in one direction are clear still
    clear = binom.cdf(most, differ, share) + binom.sf(differ - most - 1, differ, share)
    return float((binom.pmf(differ, n, changed) * clear).sum())


# --- what they say ---------------------------------------------------------------------------------------------------


def is_clear(difference: dict[str, Any]) -> bool:
    """True if the difference's interval lies wholly on one side of zero and, where there is one, the exact test agrees.

    A bootstrap interval has no width where every question says the same, however few they are: fewer than six questions
    show nothing. Even if all went one way, a sign test would give p = 2/2^5."""
    if difference["n"] < FEWEST_QUESTIONS or difference["low"] is None:
        return False
    if not (difference["low"] > 0 or difference["high"] < 0):
        return False
    return difference.get("p", 0) < difference.get("alpha", 1)


def format_interval(entry: dict[str, Any]) -> str:
    """`1.77 [1.70, 1.84]`, with digits to suit the size."""
    digits = 0 if abs(entry["value"]) >= 100 else 1 if abs(entry["value"]) >= 10 else 2
    if entry["low"] is None:
        return f"{entry['value']:.{digits}f}"
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
