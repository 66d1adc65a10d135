"""The effects of fine-tuning: paired differences in held-out loss, format, style, and similarity, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from medcot_utils.config import EvaluationSettings, RunConfig
from medcot_utils.evaluation.intervals import (
    FEWEST_QUESTIONS,
    SHOWN_AS_ZERO,
    format_interval,
    is_clear,
    mean_of,
    questions_needed,
    share_questions_needed,
)
from medcot_utils.evaluation.loss import compare_losses
from medcot_utils.evaluation.metrics import METRICS, Metric, cut_lengths, embedder, sampled_columns
from medcot_utils.evaluation.paired import ComparedMetric, CutLengths, Metrics, compare_shares, compare_statistics
from medcot_utils.plain_text import keep_intervals

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.evaluation.intervals import Difference
    from medcot_utils.evaluation.scored_set import AnsweredQuestion
    from medcot_utils.models.losses import RowLoss
    from medcot_utils.models.records import AnswerRecord

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")
# The names of both models in tables and verdicts.
Labels = tuple[str, str]
LABELS: Labels = ("base", "tuned")
# The names of both readings of answers in tables, conclusions, and claims.
BY_THEMSELVES, FORCED = "as they answer", "forced closing"
_NEVER_TESTED = """- whether an answer is medically right: no metric here checks that
- anything about questions unlike these, or about patients"""


def check_questions(config: RunConfig) -> str:
    """Return one line on the multiple-choice questions to be asked.

    This loads the questions and the embedding model, so that a missing one raises McqError or MetricError before the language
    model is loaded."""
    from medcot_utils.evaluation.mcq.run import load_questions

    settings = config.evaluation
    if settings.embedding_model is not None:
        embedder(settings.embedding_model)
    held = [len(load_questions(task)) for task in settings.mcq_tasks]
    asked = sum(min(count, settings.mcq_limit or count) for count in held)
    unused = f"; {sum(held) - asked} of {sum(held)} are left unused (evaluation.mcq_limit is {settings.mcq_limit})"
    return f"{asked} multiple-choice questions" + unused * (asked < sum(held))


# --- compare ---------------------------------------------------------------------------------------------------------


def compare(
    questions: Sequence[AnsweredQuestion],
    losses: Sequence[RowLoss],
    settings: EvaluationSettings,
    seed: int,
    models: tuple[str, str] = ("base", "tuned"),
) -> dict[str, ComparedMetric]:
    """Return every metric of two models' greedy answers; an empty dict if there is nothing to compare.

    Loss metrics are left out unless both models have `losses`. Answer metrics are left out without `questions`. Raises
    ValueError if the losses are of different rows."""
    metrics = compare_losses(losses, models, settings, seed)
    answers = ([[one.greedy[model] for one in questions]] for model in models)
    return metrics | (_compare_answers(*answers, questions, settings, seed) if questions else {})


def compare_sampled(questions: Sequence[AnsweredQuestion], settings: EvaluationSettings, seed: int) -> dict[str, ComparedMetric]:
    """Return the answer metrics of `compare` over the sampled answers; an empty dict without samples.

    Each question counts with its mean over the samples. The bootstrap resamples questions, not answers."""
    n_samples = len(questions[0].samples.get("base", [])) if questions else 0
    answers = ([[one.samples[model][k] for one in questions] for k in range(n_samples)] for model in ("base", "tuned"))
    return _compare_answers(*answers, questions, settings, seed) if n_samples else {}


def compare_all(
    questions: Sequence[AnsweredQuestion], losses: Sequence[RowLoss], settings: EvaluationSettings, seed: int
) -> dict[str, dict[str, ComparedMetric]]:
    """Compare each model with the first. Return {its label: what `compare` returns with the first as base}."""
    first, *others = questions[0].greedy
    return {label: compare(questions, losses, settings, seed, (first, label)) for label in others}


def _compare_answers(
    base: Sequence[Sequence[AnswerRecord]],
    tuned: Sequence[Sequence[AnswerRecord]],
    questions: Sequence[AnsweredQuestion],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, ComparedMetric]:
    """Compare answers: one sequence per sample, each over the questions.

    The mean of several yes-or-no answers is no longer yes or no, so its interval is the bootstrap's."""
    asked = [one.question for one in questions]
    ours, theirs = (sampled_columns(samples, asked, settings.embedding_model) for samples in (base, tuned))
    cut_base, cut_tuned = (
        Counter(name for records in side for record in records for name in cut_lengths(record)) for side in (base, tuned)
    )
    metrics = {}
    for name in ours:
        if len(base) == 1 and METRICS[name].yes_or_no:
            metrics[name] = compare_shares(ours[name], theirs[name], settings)
        else:
            columns = ours[name], theirs[name]
            metrics[name] = compare_statistics(*map(mean_of, columns), theirs[name] - ours[name], settings, seed)
        if cut_base[name] or cut_tuned[name]:
            counts = CutLengths(base=cut_base[name], tuned=cut_tuned[name], answers=len(base) * len(asked))
            metrics[name]["cut"] = counts
    return metrics


# --- in words and tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricLine:
    """Hold a compared metric as text: a line of a table."""

    metric: Metric
    base: str
    tuned: str
    difference: str
    verdict: str


def metric_lines(metrics: Metrics | None, labels: Labels = LABELS) -> dict[str, MetricLine]:
    """Return {name of the metric: its line, with values, intervals, and verdict}; an empty dict without metrics."""
    return {
        name: MetricLine(
            METRICS[name],
            *(format_side(metric, side) for side in ("base", "tuned", "difference")),
            verdict(name, metric, labels),
        )
        for name, metric in (metrics or {}).items()
    }


def count_of(name: str, n: int) -> str:
    """Return what a metric was measured on, as in `24 questions` or `1 held-out row`."""
    what = "held-out row" if name in ("eval_loss", "perplexity") else "question"
    return f"{n:,} {what}{'s' * (n != 1)}"


def format_side(metric: ComparedMetric, side: Side | Literal["difference"]) -> str:
    """Return one number of a metric with its interval. Begin with `at least` or `at most` if cut lengths make it a bound."""
    cut = metric.get("cut", {"base": 0, "tuned": 0})
    # If base answers were longer, the difference would be smaller; if tuned answers were, larger. With both, it has no bound.
    below = cut["base"] == 0 < cut["tuned"] if side == "difference" else cut[side] > 0
    above = side == "difference" and cut["tuned"] == 0 < cut["base"]
    return "at least " * below + "at most " * above + format_interval(metric[side])


def undone_by_cut(name: str, metric: ComparedMetric, labels: Labels = LABELS) -> str:
    """Say which cut answers could undo a difference if they were whole; return an empty text if none could.

    If a length fell and base answers were cut, it really fell by more. If tuned answers were cut, it may not have fallen."""
    value = metric["difference"]["value"]
    side = "tuned" if value < 0 else "base"
    return describe_cut(name, metric, labels, (side,)) if value else ""


def describe_cut(name: str, metric: ComparedMetric, labels: Labels = LABELS, sides: Sequence[Side] = SIDES) -> str:
    """Say how many answers were cut, as in `the thinking of 5 of 24 base answers was cut`; return "" if none was."""
    cut = metric.get("cut", {"base": 0, "tuned": 0})
    counts = [
        f"{cut[side]} of {cut['answers']} {label} answers"
        for side, label in zip(SIDES, labels, strict=True)
        if side in sides and cut[side]
    ]
    text = " and ".join(counts)
    return text and (f"the thinking of {text} was cut" if name.startswith("thinking") else f"{text} were cut")


def is_shown(name: str, metric: ComparedMetric) -> bool:
    """Return whether a difference is clear and would stay clear if no answer had been cut."""
    return is_clear(metric["difference"]) and not undone_by_cut(name, metric)


def verdict(name: str, metric: ComparedMetric, labels: Labels = LABELS) -> str:
    """Say whether the metric rose or fell, and for better or worse, or that no difference is shown.

    The verdict depends only on the interval, the exact test, and the cut answers. A difference that `format_interval` shows as
    0.00, ends of its interval included, is no better and no worse."""
    difference = metric["difference"]
    if not np.isfinite(difference["value"]):
        return "can't tell: not a finite number"
    if not is_clear(difference):
        return f"no difference shown with {count_of(name, difference['n'])}{_explain_unclear(difference)}"
    if undone := undone_by_cut(name, metric, labels):
        return f"can't tell: {undone}"
    direction = "rose" if difference["value"] > 0 else "fell"
    if max(abs(difference["low"]), abs(difference["high"])) < SHOWN_AS_ZERO:
        return f"{direction} by less than {SHOWN_AS_ZERO}"
    better = METRICS[name].better
    judged = "" if not better else ", better" if np.sign(difference["value"]) == better else ", worse"
    return direction + judged


def _explain_unclear(difference: Difference) -> str:
    """Say why a difference is not clear if its interval does not show it; return "" if the interval includes zero."""
    if difference["n"] < FEWEST_QUESTIONS:
        return f"; at least {FEWEST_QUESTIONS} are needed"
    if difference["low"] is not None and difference["low"] * difference["high"] > 0:
        return f"; McNemar's exact p is {difference['p']:.3f}"
    return ""


def conclusions(metrics: Metrics, forced: Metrics | None = None) -> str:
    """Return Markdown that says what the numbers do and do not show, in both readings, computed from the intervals."""
    found = _conclusions(metrics)
    if forced:
        found = f"### {BY_THEMSELVES.capitalize()}\n\n{found}\n\n### {FORCED.capitalize()}\n\n{_conclusions(forced)}"
    return keep_intervals(f"{found}\n\n**Not tested** at all:\n\n{_NEVER_TESTED}")


def _conclusions(metrics: Metrics) -> str:
    shown, not_shown = [], []
    for name, metric in metrics.items():
        difference, text = metric["difference"], METRICS[name].label
        if is_shown(name, metric):
            sides = f"from {format_side(metric, 'base')} to {format_side(metric, 'tuned')}"
            shown.append(f"- {text} **{verdict(name, metric)}**, {sides}")
        else:
            needed = difference["needed"] if not is_clear(difference) else None
            size = f"; a difference of that size takes about {needed:,} questions" if needed else ""
            not_shown.append(f"- {text}: {verdict(name, metric)} ({format_side(metric, 'difference')}{size})")
    parts = ["**Shown**: the interval of the difference excludes zero:", "\n".join(shown) or "- nothing"]
    if not_shown:
        parts += [
            "**Not shown**: the interval includes zero, the exact test is not clear, answers were cut, or there are too few:",
            "\n".join(not_shown),
        ]
    return "\n\n".join(parts)


def needed_table(metrics: Metrics, confidence_level: float, sizes: Sequence[float] = (0.05, 0.1, 0.2)) -> pd.DataFrame:
    """Return how many questions each metric from 0 to 1 needs to show the difference found, and differences of given sizes.

    The power is 0.8. A cell is empty if nothing differs between questions."""
    import pandas as pd

    lines = []
    for name, metric in metrics.items():
        found = metric["difference"]
        if not METRICS[name].from_0_to_1:
            continue
        if "changed" in found:
            needed = [share_questions_needed(found["changed"], size, confidence_level) for size in sizes]
        else:
            needed = [questions_needed(found["spread"], size, confidence_level) for size in sizes]
        counts = ["" if number is None else f"{number:,}" for number in (found["needed"], *needed)]
        lines.append([METRICS[name].label, f"{found['value']:z.2f}", *counts])
    columns = ["metric", "found", "for that", *(f"for {size:.2f}" for size in sizes)]
    return pd.DataFrame(lines, columns=columns).set_index("metric")


def metrics_table(metrics: Metrics, forced: Metrics | None = None, labels: Labels = LABELS) -> pd.DataFrame:
    """Return the comparison as a table: one line per metric, with values, intervals, and verdict.

    With `forced`, a metric has one line per reading, one below the other, because the columns of both would not fit on a page."""
    import pandas as pd

    lines = {
        (line.metric.label, reading): [line.base, line.tuned, line.difference, line.verdict]
        for name in metrics
        for reading, measured in {BY_THEMSELVES: metrics, FORCED: forced or {}}.items()
        if name in measured
        for line in metric_lines({name: measured[name]}, labels).values()
    }
    index = pd.MultiIndex.from_frame(pd.DataFrame([*lines], columns=["metric", "reading"]))
    table = pd.DataFrame([*lines.values()], index=index, columns=[*labels, "difference", "verdict"])
    return table if forced else table.droplevel(1)
