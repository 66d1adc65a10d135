"""Intervals, exact tests, and the number of questions needed, for one model and for two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import EvaluationSettings

Array = np.ndarray
# A function of question positions, which lie along the last axis; the axes before it are resamples.
Statistic = Callable[[Array], Array]
SHOWN_AS_ZERO = 0.005  # what is smaller is 0.00 in two digits
FEWEST_QUESTIONS = 6
# For more questions than this, the normal approximation of the exact test's power is close enough.
_EXACT_POWER_UP_TO = 5000


class Estimate(TypedDict):
    """Hold a number measured on `n` questions, with its interval at evaluation.confidence_level.

    low, high: None if the value is not finite, or if a bootstrap had fewer than two questions."""

    value: float
    low: float | None
    high: float | None
    n: int


class Difference(Estimate):
    """Hold the tuned model's number minus the base's, over the same questions.

    needed: how many questions show a difference of this size with a power of 0.8; None if nothing differs.
    spread: the standard deviation of the difference over questions, for a mean or a ratio.
    p, alpha, changed: McNemar's exact p, the level it must stay below, and the share of questions that changed, for a share."""

    needed: int | None
    spread: NotRequired[float]
    p: NotRequired[float]
    alpha: NotRequired[float]
    changed: NotRequired[float]


# --- means and ratios ------------------------------------------------------------------------------------------------


def mean_of(column: Array) -> Statistic:
    """Return a statistic: the mean of a column with one value per question."""
    return lambda drawn: column[drawn].mean(axis=-1)


def ratio_of(numerator: Array, denominator: Array) -> Statistic:
    """Return a statistic: the sum of one column divided by the sum of another, as in a loss per token."""
    return lambda drawn: numerator[drawn].sum(axis=-1) / denominator[drawn].sum(axis=-1)


def estimate(statistic: Statistic, n: int, settings: EvaluationSettings, seed: int) -> Estimate:
    """Return a statistic over `n` questions with its bootstrap interval."""
    return estimate_all([statistic], n, settings, seed)[0]


def estimate_all(statistics: Sequence[Statistic], n: int, settings: EvaluationSettings, seed: int) -> list[Estimate]:
    """Return statistics over the same `n` questions with their bootstrap intervals, from the same resamples.

    Questions are resampled whole, so both models' answers to one question stay together (scipy.stats.bootstrap).
    The plain percentile interval is too narrow for few questions. The expanded percentiles of Hesterberg 2015 ("What Teachers
    Should Know About the Bootstrap", doi:10.1080/00031305.2015.1089789) make it as wide as Student's."""
    from scipy.stats import bootstrap

    questions = np.arange(n)
    with np.errstate(all="ignore"):  # a diverged model's loss or perplexity is not finite
        values = [float(statistic(questions)) for statistic in statistics]
        found: list[Estimate] = [{"value": value, "low": None, "high": None, "n": n} for value in values]
        finite = [i for i, value in enumerate(values) if n > 1 and math.isfinite(value)]
        if not finite:
            return found
        interval = bootstrap(
            (questions,),
            lambda drawn, axis: np.stack([statistics[i](drawn) for i in finite]),
            vectorized=True,
            n_resamples=settings.n_resamples,
            confidence_level=_expanded(settings.confidence_level, n),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    for i, low, high in zip(finite, interval.low, interval.high, strict=True):
        found[i] |= {"low": float(low), "high": float(high)}
    return found


def _expanded(level: float, n: int) -> float:
    from scipy.stats import norm, t

    return min(1 - 2 * norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.5 + level / 2, n - 1)), 1 - 1e-9)


def questions_needed(spread: float, difference: float, confidence_level: float = 0.95, power: float = 0.8) -> int | None:
    """Return how many questions a paired comparison needs to show a mean difference of this size with this power.

    The normal approximation gives ((z_confidence + z_power) x spread / difference)^2, where `spread` is the standard
    deviation of the difference over questions. The number is at least FEWEST_QUESTIONS, and None if nothing differs or a
    value is not finite. Source: Chow, Shao and Wang, "Sample Size Calculations in Clinical Research", 3.1."""
    from scipy.stats import norm

    if not difference or not spread or not math.isfinite(spread / difference):
        return None
    z = norm.ppf(0.5 + confidence_level / 2) + norm.ppf(power)
    return max(FEWEST_QUESTIONS, math.ceil((z * spread / difference) ** 2))


def questions_needed_within(
    spread: float, difference: float, margin: float, confidence_level: float = 0.95, power: float = 0.8
) -> int | None:
    """Return how many questions a paired comparison needs for an interval within `margin` on both sides, with this power.

    It is `questions_needed` for the distance between the difference found and the margin. None if the difference found is not
    within the margin, or if nothing differs."""
    return questions_needed(spread, margin - abs(difference), confidence_level, power) if abs(difference) < margin else None


# --- shares of yes and no --------------------------------------------------------------------------------------------


def estimate_share(values: Array, confidence_level: float) -> Estimate:
    """Return the share of ones with Wilson's interval (1927, as in scipy).

    This interval keeps its level if the share is near 0 or 1, while a bootstrap interval would have no width there."""
    from scipy.stats import binomtest

    n = len(values)
    found = binomtest(int(sum(values)), n).proportion_ci(confidence_level, method="wilson")
    return {"value": float(np.mean(values)), "low": float(found.low), "high": float(found.high), "n": n}


class PairedCounts(TypedDict):
    """Hold how many of `n` questions are a yes for both models, for one of them alone, and for neither."""

    n: int
    both: int
    only_base: int
    only_tuned: int
    neither: int


def count_pairs(base: Array, tuned: Array) -> PairedCounts:
    """Count two columns of ones and zeros over the same questions."""
    return {
        "n": len(base),
        "both": int((base * tuned).sum()),
        "only_base": int((base * (1 - tuned)).sum()),
        "only_tuned": int(((1 - base) * tuned).sum()),
        "neither": int(((1 - base) * (1 - tuned)).sum()),
    }


def estimate_share_difference(base: Array, tuned: Array, settings: EvaluationSettings) -> Difference:
    """Return the tuned share minus the base's, from two columns of ones and zeros over the same questions.

    `low` and `high` are Newcombe's interval for paired shares (1998, Statistics in Medicine 17:2635, method 10). It combines
    the Wilson intervals of both shares through their correlation."""
    level, counts = settings.confidence_level, count_pairs(base, tuned)
    before, after = estimate_share(base, level), estimate_share(tuned, level)
    value, correlation = after["value"] - before["value"], _correlation(counts)
    changed = (counts["only_base"] + counts["only_tuned"]) / counts["n"]

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0))

    return {
        "value": value,
        "low": value - joined(after["value"] - after["low"], before["high"] - before["value"]),
        "high": value + joined(after["high"] - after["value"], before["value"] - before["low"]),
        "n": counts["n"],
        "p": exact_p(base, tuned),
        "alpha": round(1 - level, 6),
        "changed": changed,
        "needed": share_questions_needed(changed, value, level),
    }


def _correlation(counts: PairedCounts) -> float:
    """Return the phi coefficient of two shares, with Newcombe's continuity correction if it is positive."""
    both, neither, only_base, only_tuned = counts["both"], counts["neither"], counts["only_base"], counts["only_tuned"]
    products = both * neither - only_base * only_tuned
    margins = (both + only_base) * (only_tuned + neither) * (both + only_tuned) * (only_base + neither)
    return (max(products - counts["n"] / 2, 0) if products > 0 else products) / math.sqrt(margins) if margins else 0.0


def exact_p(base: Array, tuned: Array) -> float:
    """Return McNemar's exact two-sided p for yes-or-no answers to the same questions; 1 if they differ on none.

    If the models were equally good, a question on which they differ would be equally likely to favor either
    (scipy.stats.binomtest)."""
    from scipy.stats import binomtest

    counts = count_pairs(base, tuned)
    changed = counts["only_base"] + counts["only_tuned"]
    return float(binomtest(counts["only_tuned"], changed).pvalue) if changed else 1.0


def share_questions_needed(changed: float, difference: float, confidence_level: float = 0.95, power: float = 0.8) -> int | None:
    """Return how many questions McNemar's exact test needs to show a difference of two shares with this power.

    The models differ on the share `changed` of the questions. Up to a few thousand questions, the power is the test's own
    (`exact_power`); for more, it is that of the normal approximation. The number is at least FEWEST_QUESTIONS, and None if
    nothing differs."""
    from scipy.stats import norm

    if difference == 0:
        return None
    changed = max(changed, abs(difference))
    z = norm.ppf(0.5 + confidence_level / 2) * math.sqrt(changed) + norm.ppf(power) * math.sqrt(changed - difference**2)
    n = max(FEWEST_QUESTIONS, math.ceil((z / difference) ** 2))
    while n <= _EXACT_POWER_UP_TO and exact_power(n, changed, difference, confidence_level) < power:
        n += max(1, n // 50)
    return n


def share_questions_needed_within(
    changed: float, difference: float, margin: float, confidence_level: float = 0.95, power: float = 0.8
) -> int | None:
    """Return what `questions_needed_within` returns, for two models that differ on the share `changed` of the questions.

    The number is large enough for the case that they differ on none: Wilson's interval of a share of 0 ends at
    z^2 / (n + z^2)."""
    from scipy.stats import norm

    z = norm.ppf(0.5 + confidence_level / 2)
    fewest = max(FEWEST_QUESTIONS, math.ceil(z**2 * (1 - margin) / margin))
    spread = math.sqrt(max(changed - difference**2, 0))
    if abs(difference) >= margin:
        return None
    return max(fewest, questions_needed_within(spread, difference, margin, confidence_level, power) or 0)


def half_questions_needed(share: float, confidence_level: float = 0.95, power: float = 0.8) -> int | None:
    """Return how many questions show, with this power, that a share of this size is not one half; None if it is one half.

    It is the normal approximation of Chow, Shao and Wang, "Sample Size Calculations in Clinical Research", 4.1."""
    from scipy.stats import norm

    if share == 0.5:
        return None
    z = norm.ppf(0.5 + confidence_level / 2) / 2 + norm.ppf(power) * math.sqrt(share * (1 - share))
    return max(FEWEST_QUESTIONS, math.ceil((z / (share - 0.5)) ** 2))


def exact_power(n: int, changed: float, difference: float, confidence_level: float = 0.95) -> float:
    """Return the probability that McNemar's exact test of `n` questions is clear.

    The models differ on the share `changed` of all questions, and their shares differ by `difference`. The probability is
    summed over the number of questions on which they may differ, and over how these may divide."""
    from scipy.stats import binom

    differ = np.arange(n + 1)
    share = (changed + abs(difference)) / (2 * changed)
    most = binom.ppf((1 - confidence_level) / 2, differ, 0.5) - 1  # at most this many in one direction are still clear
    clear = binom.cdf(most, differ, share) + binom.sf(differ - most - 1, differ, share)
    return float((binom.pmf(differ, n, changed) * clear).sum())


# --- what they say ---------------------------------------------------------------------------------------------------


def is_clear(difference: Difference) -> bool:
    """Return True if the interval lies wholly on one side of zero and the exact test, if there is one, agrees.

    Fewer than six questions show nothing. If they all agree, a bootstrap interval has no width, however few they are; yet
    a sign test of five questions that all go one way gives p = 2/2^5, which is above 0.05."""
    if difference["n"] < FEWEST_QUESTIONS or difference["low"] is None:
        return False
    if not (difference["low"] > 0 or difference["high"] < 0):
        return False
    return difference.get("p", 0) < difference.get("alpha", 1)


def format_interval(estimate: Estimate) -> str:
    """Return the estimate as text, as in `1.77 [1.70, 1.84]`. The number of digits depends on its size.

    A small difference whose interval excludes zero gets a third digit if an end would be written as 0.00."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    if "needed" in estimate and low is not None and low * high > 0:  # only a difference is compared with zero
        nearer, farther = sorted((abs(low), abs(high)))
        digits += nearer < SHOWN_AS_ZERO <= farther < 1
    shown = f"z.{digits}f"  # z: a negative number that rounds to zero loses its sign
    return f"{value:{shown}}" if low is None else f"{value:{shown}} [{low:{shown}}, {high:{shown}}]"
