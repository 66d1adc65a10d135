"""What fine-tuning did and did not do: held-out loss, format, style and similarity, each with an interval, paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcot_utils.config import EvaluationSettings, RunConfig
from medcot_utils.measures import METRICS, answer_columns, embedder, sampled_columns

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
FEWEST_QUESTIONS = 6


def _ratio(numerator: Array, denominator: Array, axis: int = -1) -> Array:
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def interval(
    statistic: Callable[..., Array], columns: Sequence[Array], settings: EvaluationSettings, seed: int
) -> dict[str, Any]:
    """{value, low, high, n}: a statistic over paired per-question columns and its bootstrap percentile interval.

    Questions are resampled whole, so both models' answers to one question stay together (scipy.stats.bootstrap, paired).
    `statistic` takes the columns and an `axis`. low and high are None for a single question."""
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
        confidence_level=settings.confidence_level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"value": value, "low": float(found.low), "high": float(found.high), "n": n}


def exact_p(base: Array, tuned: Array) -> float:
    """McNemar's exact two-sided p for yes-or-no answers to the same questions: of those on which the models differ, as
    many should go either way if nothing had changed (scipy.stats.binomtest); 1 where they differ on none."""
    from scipy.stats import binomtest

    only_base, only_tuned = int(((base == 1) & (tuned == 0)).sum()), int(((base == 0) & (tuned == 1)).sum())
    return float(binomtest(only_tuned, only_base + only_tuned).pvalue) if only_base + only_tuned else 1.0


def questions_needed(spread: float, difference: float, confidence_level: float = 0.95, power: float = 0.8) -> int | None:
    """How many questions a paired comparison needs to show a mean difference of this size with this power, by the normal
    approximation: ((z_confidence + z_power) x spread / difference)^2, `spread` being the standard deviation of the
    difference between questions. None where nothing differs.

    Source: any textbook's sample size of a paired test, e.g. Chow, Shao and Wang, "Sample Size Calculations in Clinical
    Research", 3.1."""
    from scipy.stats import norm

    if difference == 0 or spread == 0:
        return None
    z = norm.ppf(0.5 + confidence_level / 2) + norm.ppf(power)
    return max(2, int(np.ceil((z * spread / difference) ** 2)))


def _sides(
    single: Callable[..., Array],
    base: Sequence[Array],
    tuned: Sequence[Array],
    settings: EvaluationSettings,
    seed: int,
    yes_or_no: bool = False,
) -> dict[str, dict[str, Any]]:
    def difference(*columns: Array, axis: int = -1) -> Array:
        half = len(columns) // 2
        return single(*columns[half:], axis=axis) - single(*columns[:half], axis=axis)

    found = {
        "base": interval(single, base, settings, seed),
        "tuned": interval(single, tuned, settings, seed),
        "difference": interval(difference, (*base, *tuned), settings, seed),
    }
    # A row of the loss counts by its tokens; its own loss is near enough to say how much rows differ.
    spread = (tuned[0] / tuned[-1] - base[0] / base[-1]) if len(base) > 1 else tuned[0] - base[0]
    level, difference_value = settings.confidence_level, found["difference"]["value"]
    needed = questions_needed(float(np.std(spread, ddof=1)), difference_value, level) if len(spread) > 1 else None
    found["difference"] |= {"needed": needed}
    if yes_or_no:
        found["difference"] |= {"p": exact_p(base[0], tuned[0]), "alpha": round(1 - settings.confidence_level, 6)}
    return found


def check_usable(config: RunConfig) -> int:
    """The number of multiple-choice questions to be asked, after everything the evaluation needs was looked at: its questions
    and its embedding model. Raises McqError or MeasureError, before a model is loaded."""
    from medcot_utils.mcq import load_questions

    settings = config.evaluation
    if settings.embedding_model is not None:
        embedder(settings.embedding_model)
    return sum(len(load_questions(task, settings.mcq_limit, config.seed)) for task in settings.mcq_tasks)


def compare(
    base_answers: Sequence[dict[str, Any]],
    tuned_answers: Sequence[dict[str, Any]],
    references: Sequence[str],
    losses: Sequence[dict[str, Any]],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every metric as {base, tuned, difference}, each {value, low, high, n}; the difference is tuned minus base, paired.

    The difference also has `needed` (see `questions_needed`) and, for metrics of yes or no, the exact `p`. Without losses
    (`[]`) the two metrics made of them are left out. Raises ValueError if the two models did not answer the same questions
    in the same order."""
    _same_questions(base_answers, tuned_answers)
    metrics = _compare_losses(losses, settings, seed) if losses else {}
    columns = (answer_columns(records, references, settings.embedding_model) for records in (base_answers, tuned_answers))
    return metrics | _compare_columns(*columns, settings, seed, yes_or_no=True)


def compare_sampled(
    base_samples: Sequence[Sequence[dict[str, Any]]],
    tuned_samples: Sequence[Sequence[dict[str, Any]]],
    references: Sequence[str],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """As `compare`, over several sampled answers a question: each question counts with its mean, and questions, not
    answers, are what is resampled. `base_samples[k]` holds sample k of every question, in one order throughout."""
    for base, tuned in zip(base_samples, tuned_samples, strict=True):
        _same_questions(base, tuned)
    columns = (sampled_columns(samples, references, settings.embedding_model) for samples in (base_samples, tuned_samples))
    return _compare_columns(*columns, settings, seed, yes_or_no=len(base_samples) == 1)


def compare_all(
    answers: Mapping[str, Sequence[dict[str, Any]]],
    references: Sequence[str],
    losses: Sequence[dict[str, Any]],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Any number of models by label, each compared with the first: {label: what `compare` gives, first as base}.

    `losses`: records of `losses.row_losses` whose `model` is a label; a model without them has no loss metrics."""
    first, *others = answers
    compared = {}
    for label in others:
        renamed = [
            record | {"model": "base" if record["model"] == first else "tuned"}
            for record in losses
            if record["model"] in (first, label)
        ]
        both = {record["model"] for record in renamed} == {"base", "tuned"}
        compared[label] = compare(answers[first], answers[label], references, renamed if both else [], settings, seed)
    return compared


def _same_questions(base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> None:
    if [record["id"] for record in base] != [record["id"] for record in tuned]:
        raise ValueError("base and tuned answers are to different questions: run notebooks 02 and 06 of one run")


def _compare_losses(
    losses: Sequence[dict[str, Any]], settings: EvaluationSettings, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    records = [[record for record in losses if record["model"] == label] for label in ("base", "tuned")]
    base, tuned = ([np.array([r[key] for r in rows], dtype=float) for key in ("nll", "tokens")] for rows in records)

    def perplexity(nll: Array, tokens: Array, axis: int = -1) -> Array:
        return np.exp(_ratio(nll, tokens, axis=axis))

    found = {
        "eval_loss": _sides(_ratio, base, tuned, settings, seed),
        "perplexity": _sides(perplexity, base, tuned, settings, seed),
    }
    found["perplexity"]["difference"]["needed"] = found["eval_loss"]["difference"]["needed"]  # the same rows tell both apart
    return found


def _compare_columns(
    base: Mapping[str, Array], tuned: Mapping[str, Array], settings: EvaluationSettings, seed: int, yes_or_no: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        name: _sides(np.mean, [base[name]], [tuned[name]], settings, seed, yes_or_no and METRICS[name].yes_or_no) for name in base
    }


def is_clear(difference: dict[str, Any]) -> bool:
    """True if the difference's interval lies wholly on one side of zero and, where there is one, the exact test agrees.

    A bootstrap interval has no width where every question says the same, however few they are; the exact test knows. Where
    there is none, fewer than six questions show nothing: even if all went one way, a sign test would give p = 2/2^5."""
    if difference["n"] < FEWEST_QUESTIONS or difference["low"] is None:
        return False
    if not (difference["low"] > 0 or difference["high"] < 0):
        return False
    return difference.get("p", 0) < difference.get("alpha", 1)


def verdict(name: str, metric: dict[str, dict[str, Any]]) -> str:
    """In words, from interval and test alone: rose, fell, or cannot be told apart with n questions."""
    difference = metric["difference"]
    if not is_clear(difference):
        return f"no difference shown with {difference['n']} questions"
    direction = "rose" if difference["value"] > 0 else "fell"
    better = METRICS[name].better
    judged = "" if not better else ", better" if np.sign(difference["value"]) == better else ", worse"
    return direction + judged


def conclusions(metrics: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What the numbers do and do not show, as Markdown, computed from the intervals."""
    shown, not_shown = [], []
    for name, metric in metrics.items():
        difference, text = metric["difference"], METRICS[name].label
        if is_clear(difference):
            sides = f"from {format_interval(metric['base'])} to {format_interval(metric['tuned'])}"
            shown.append(f"- {text} **{verdict(name, metric)}**, {sides}")
        else:
            needed = f"; a difference of that size takes about {difference['needed']:,} questions" if difference["needed"] else ""
            not_shown.append(f"- {text}: {verdict(name, metric)} ({format_interval(difference)}{needed})")
    never = (
        "- whether an answer is medically right: no metric here reads for that\n"
        "- anything about questions unlike these, or about patients"
    )
    parts = ["**Shown**, the interval of the difference lies clear of zero:", "\n".join(shown) or "- nothing"]
    if not_shown:
        parts += ["**Not shown**, the interval holds zero or the exact test is not clear:", "\n".join(not_shown)]
    return "\n\n".join([*parts, "**Not tested** at all:", never])


def metrics_table(metrics: dict[str, dict[str, dict[str, Any]]]) -> pd.DataFrame:
    """The comparison as a reader wants it: one line a metric, values with their intervals, and the verdict."""
    import pandas as pd

    lines = []
    for name, metric in metrics.items():
        cells = {side: format_interval(metric[side]) for side in ("base", "tuned", "difference")}
        lines.append({"metric": METRICS[name].label, **cells, "verdict": verdict(name, metric)})
    return pd.DataFrame(lines).set_index("metric")


def format_interval(entry: dict[str, Any]) -> str:
    """`1.77 [1.70, 1.84]`, with digits to suit the size."""
    digits = 0 if abs(entry["value"]) >= 100 else 1 if abs(entry["value"]) >= 10 else 2
    if entry["low"] is None:
        return f"{entry['value']:.{digits}f}"
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
