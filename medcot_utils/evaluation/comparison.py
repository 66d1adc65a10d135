"""What fine-tuning did and did not do: held-out loss, format, style and similarity, each with an interval, paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcot_utils.config import EvaluationSettings, RunConfig
from medcot_utils.evaluation.intervals import (
    format_interval,
    interval,
    is_clear,
    questions_needed,
    rate,
    rate_difference,
    rate_questions_needed,
)
from medcot_utils.evaluation.metrics import METRICS, answer_columns, embedder, sampled_columns

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
# Units of metrics whose differences can be compared with one another.
SCALES_TO_1 = ("share", "F1", "0 to 1", "cosine")


def _ratio(numerator: Array, denominator: Array, axis: int = -1) -> Array:
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def _sides(
    single: Callable[..., Array],
    base: Sequence[Array],
    tuned: Sequence[Array],
    settings: EvaluationSettings,
    seed: int,
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
    differences = (tuned[0] / tuned[-1] - base[0] / base[-1]) if len(base) > 1 else tuned[0] - base[0]
    spread, value = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0, found["difference"]["value"]
    found["difference"] |= {"spread": spread, "needed": questions_needed(spread, value, settings.confidence_level)}
    return found


def check_questions(config: RunConfig) -> str:
    """Return one line on the multiple-choice questions to be asked, after a look at all that the evaluation needs: its
    questions and its embedding model. Raises McqError or MeasureError, before a model is loaded."""
    from medcot_utils.evaluation.mcq.run import load_questions

    settings = config.evaluation
    if settings.embedding_model is not None:
        embedder(settings.embedding_model)
    questions = sum(len(load_questions(task, settings.mcq_limit, config.seed)) for task in settings.mcq_tasks)
    return f"{questions} multiple-choice questions"


def compare(
    base_answers: Sequence[dict[str, Any]],
    tuned_answers: Sequence[dict[str, Any]],
    references: Sequence[str],
    losses: Sequence[dict[str, Any]],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every metric as {base, tuned, difference}, each {value, low, high, n}; the difference is tuned minus base, paired.

    Shares of yes and no have the intervals and the test of `intervals.rate_difference`, the rest `intervals.interval`'s and
    the `spread` of the difference between questions; each difference has `needed` (see there). Without losses (`[]`) the two
    metrics made of them are left out. Raises ValueError if the two models did not answer the same questions
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
        name: compare_rates(base[name], tuned[name], settings)
        if yes_or_no and METRICS[name].yes_or_no
        else _sides(np.mean, [base[name]], [tuned[name]], settings, seed)
        for name in base
    }


def compare_rates(base: Array, tuned: Array, settings: EvaluationSettings) -> dict[str, dict[str, Any]]:
    """{base, tuned, difference} of two columns of ones and zeros over the same questions, as `compare` has them."""
    sides = {label: rate(column, settings.confidence_level) for label, column in (("base", base), ("tuned", tuned))}
    return sides | {"difference": rate_difference(base, tuned, settings)}


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


def needed_table(
    metrics: dict[str, dict[str, dict[str, Any]]], confidence_level: float, sizes: Sequence[float] = (0.05, 0.1, 0.2)
) -> pd.DataFrame:
    """How many questions each metric on a scale from 0 to 1 needs to show a difference as large as the one found, and ones
    of the given sizes, with a power of 0.8; empty cells where nothing differs between questions."""
    import pandas as pd

    lines = []
    for name, metric in metrics.items():
        found = metric["difference"]
        if METRICS[name].unit not in SCALES_TO_1:
            continue
        if "changed" in found:
            needed = [rate_questions_needed(found["changed"], size, confidence_level) for size in sizes]
        else:
            needed = [questions_needed(found["spread"], size, confidence_level) for size in sizes]
        of_sizes = {f"for {size:.2f}": number for size, number in zip(sizes, needed, strict=True)}
        lines.append({"metric": METRICS[name].label, "found": f"{found['value']:.2f}", "for that": found["needed"]} | of_sizes)
    table = pd.DataFrame(lines).set_index("metric")
    return table.astype(dict.fromkeys(table.columns[1:], "Int64"))


def metrics_table(metrics: dict[str, dict[str, dict[str, Any]]]) -> pd.DataFrame:
    """The comparison as a reader wants it: one line a metric, values with their intervals, and the verdict."""
    import pandas as pd

    lines = []
    for name, metric in metrics.items():
        cells = {side: format_interval(metric[side]) for side in ("base", "tuned", "difference")}
        lines.append({"metric": METRICS[name].label, **cells, "verdict": verdict(name, metric)})
    return pd.DataFrame(lines).set_index("metric")
