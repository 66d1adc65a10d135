"""What fine-tuning did and did not do: held-out loss, format, style and similarity, each with an interval, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from medcot_utils.config import EvaluationSettings, RunConfig
from medcot_utils.data.words import counts_characters
from medcot_utils.evaluation.intervals import (
    Array,
    Difference,
    Estimate,
    Statistic,
    estimate,
    estimate_share,
    estimate_share_difference,
    format_interval,
    is_clear,
    mean_of,
    questions_needed,
    ratio_of,
    share_questions_needed,
)
from medcot_utils.evaluation.metrics import METRICS, Metric, embedder, sampled_columns

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.evaluation.claims import ClaimVerdict
    from medcot_utils.evaluation.scored_set import AnsweredQuestion
    from medcot_utils.models.losses import RowLoss
    from medcot_utils.models.records import AnswerRecord

_COUNTED_BY_CHARACTER = (
    "Words are counted by white space. Chinese, Japanese, Thai and some other scripts have none between words: there each "
    "character counts as a word, in lengths, repetition and ROUGE-L."
)
_NEVER_TESTED = """- whether an answer is medically right: no metric here reads for that
- anything about questions unlike these, or about patients"""


class ComparedMetric(TypedDict):
    """Hold one metric of two models on the same questions. The difference is tuned minus base, paired."""

    base: Estimate
    tuned: Estimate
    difference: Difference


# By the metric's name, a key of METRICS.
Metrics = Mapping[str, ComparedMetric]


class LossBars(TypedDict):
    """Hold the held-out loss of three models on the same rows, in nats per trained token.

    rounding: the 4-bit base minus the 16-bit base: what rounding had cost. learning: the tuned model minus the 16-bit base.
    share: rounding over the whole fall from base to tuned; None if the loss did not fall."""

    base_16bit: Estimate
    base: Estimate
    tuned: Estimate
    rounding: Difference
    learning: Difference
    share: Estimate | None


class Measured(TypedDict):
    """Hold the content of metrics.json, all of greedy answers unless a field says otherwise.

    n_questions, metrics: the questions that count, and their metrics as the models answer by themselves, with those of loss
    and multiple choice. forced: the answers' metrics with forced closing over the same questions; absent without it, as in
    earlier runs, and so are the other fields marked so.
    claims: the article's claims, judged. notes: lines that the report shows below its tables.
    n_samples, sampled: sampled answers a question, and their metrics; None without samples. sampled_forced: with forced
    closing.
    n_answered, answered: the counted questions that both models answered in full form; empty if there are none.
    n_contaminated, contaminated: the questions that training rows repeat; None if there are none.
    losses: the loss in three bars; absent if the 16-bit base's was not taken."""

    n_questions: int
    metrics: Metrics
    forced: NotRequired[Metrics]
    claims: Sequence[ClaimVerdict]
    notes: Sequence[str]
    n_samples: int
    sampled: Metrics | None
    sampled_forced: NotRequired[Metrics | None]
    n_answered: int
    answered: Metrics
    n_contaminated: int
    contaminated: Metrics | None
    losses: NotRequired[LossBars]


def check_questions(config: RunConfig) -> str:
    """Return one line on the multiple-choice questions to be asked, after a look at all that the evaluation needs: its
    questions and its embedding model. Raises McqError or MetricError, before a model is loaded."""
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

    The metrics of the loss are left out unless both models have `losses`, those of answers without `questions`."""
    base, tuned = ([record for record in losses if record["model"] == model] for model in models)
    metrics = _compare_losses(base, tuned, settings, seed) if base and tuned else {}
    answers = ([[one.greedy[model] for one in questions]] for model in models)
    return metrics | (_compare_answers(*answers, questions, settings, seed) if questions else {})


def compare_sampled(questions: Sequence[AnsweredQuestion], settings: EvaluationSettings, seed: int) -> dict[str, ComparedMetric]:
    """Return what `compare` gives of answers, over the sampled ones; an empty dict without samples.

    Each question counts with its mean, and questions, not answers, are what is resampled."""
    n_samples = len(questions[0].samples["base"]) if questions else 0
    answers = ([[one.samples[model][k] for one in questions] for k in range(n_samples)] for model in ("base", "tuned"))
    return _compare_answers(*answers, questions, settings, seed) if n_samples else {}


def compare_all(
    questions: Sequence[AnsweredQuestion], losses: Sequence[RowLoss], settings: EvaluationSettings, seed: int
) -> dict[str, dict[str, ComparedMetric]]:
    """Compare each model with the first: {its label: what `compare` gives with the first as base}."""
    first, *others = questions[0].greedy
    return {label: compare(questions, losses, settings, seed, (first, label)) for label in others}


def compare_shares(base: Array, tuned: Array, settings: EvaluationSettings) -> ComparedMetric:
    """Compare two columns of ones and zeros over the same questions."""
    level = settings.confidence_level
    difference = estimate_share_difference(base, tuned, settings)
    return {"base": estimate_share(base, level), "tuned": estimate_share(tuned, level), "difference": difference}


def _compare_losses(
    base: Sequence[RowLoss], tuned: Sequence[RowLoss], settings: EvaluationSettings, seed: int
) -> dict[str, ComparedMetric]:
    (base_nll, base_tokens), (tuned_nll, tuned_tokens) = (
        [np.array([record[key] for record in side], dtype=float) for key in ("nll", "tokens")] for side in (base, tuned)
    )
    # A row of the loss counts by its tokens; its own loss is near enough to say how much rows differ.
    changes = tuned_nll / tuned_tokens - base_nll / base_tokens
    ours, theirs = ratio_of(base_nll, base_tokens), ratio_of(tuned_nll, tuned_tokens)
    loss = _compare_statistics(ours, theirs, changes, settings, seed)
    perplexity = _compare_statistics(
        lambda drawn: np.exp(ours(drawn)), lambda drawn: np.exp(theirs(drawn)), changes, settings, seed
    )
    perplexity["difference"]["needed"] = loss["difference"]["needed"]  # the same rows tell both apart
    return {"eval_loss": loss, "perplexity": perplexity}


def _compare_answers(
    base: Sequence[Sequence[AnswerRecord]],
    tuned: Sequence[Sequence[AnswerRecord]],
    questions: Sequence[AnsweredQuestion],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, ComparedMetric]:
    """Compare answers: one sequence per sample, each over the questions. The mean of several is no yes or no."""
    references = [one.question["Response"] for one in questions]
    ours, theirs = (sampled_columns(samples, references, settings.embedding_model) for samples in (base, tuned))
    return {
        name: compare_shares(ours[name], theirs[name], settings)
        if len(base) == 1 and METRICS[name].yes_or_no
        else _compare_statistics(mean_of(ours[name]), mean_of(theirs[name]), theirs[name] - ours[name], settings, seed)
        for name in ours
    }


def _compare_statistics(
    base: Statistic, tuned: Statistic, changes: Array, settings: EvaluationSettings, seed: int
) -> ComparedMetric:
    """Compare a statistic of both models. `changes`: what it changed by from base to tuned, question by question."""
    n = len(changes)
    difference = estimate(lambda drawn: tuned(drawn) - base(drawn), n, settings, seed)
    with np.errstate(all="ignore"):
        spread = float(np.std(changes, ddof=1)) if n > 1 else 0.0
    needed = questions_needed(spread, difference["value"], settings.confidence_level)
    return {
        "base": estimate(base, n, settings, seed),
        "tuned": estimate(tuned, n, settings, seed),
        "difference": {**difference, "spread": spread, "needed": needed},
    }


# --- in words and tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricLine:
    """Hold a compared metric as text: a line of a table."""

    metric: Metric
    base: str
    tuned: str
    difference: str
    verdict: str


def describe_counting(questions: Sequence[AnsweredQuestion]) -> list[str]:
    """Return what a reader must know of how these questions' texts were counted, one note a line; nothing for most scripts."""
    texts = [text for one in questions for text in (one.question["Response"], *(a["answer"] for a in one.greedy.values()))]
    return [_COUNTED_BY_CHARACTER] if any(map(counts_characters, texts)) else []


def metric_lines(metrics: Metrics) -> list[MetricLine]:
    """Return a line for every metric: values with their intervals, and the verdict."""
    return [
        MetricLine(
            METRICS[name],
            *(format_interval(metric[side]) for side in ("base", "tuned", "difference")),
            verdict(name, metric),
        )
        for name, metric in metrics.items()
    ]


def verdict(name: str, metric: ComparedMetric) -> str:
    """Say whether the metric rose or fell, and for better or worse, or that no difference is shown.

    It goes by interval and test alone."""
    difference = metric["difference"]
    if not np.isfinite(difference["value"]):
        return "can't tell: not a finite number"
    if not is_clear(difference):
        return f"no difference shown with {difference['n']} questions"
    direction = "rose" if difference["value"] > 0 else "fell"
    better = METRICS[name].better
    judged = "" if not better else ", better" if np.sign(difference["value"]) == better else ", worse"
    return direction + judged


def conclusions(metrics: Metrics) -> str:
    """Return what the numbers do and do not show, as Markdown, computed from the intervals."""
    shown, not_shown = [], []
    for name, metric in metrics.items():
        difference, text = metric["difference"], METRICS[name].label
        if is_clear(difference):
            sides = f"from {format_interval(metric['base'])} to {format_interval(metric['tuned'])}"
            shown.append(f"- {text} **{verdict(name, metric)}**, {sides}")
        else:
            needed = f"; a difference of that size takes about {difference['needed']:,} questions" if difference["needed"] else ""
            not_shown.append(f"- {text}: {verdict(name, metric)} ({format_interval(difference)}{needed})")
    parts = ["**Shown**, the interval of the difference lies clear of zero:", "\n".join(shown) or "- nothing"]
    if not_shown:
        parts += ["**Not shown**, the interval holds zero or the exact test is not clear:", "\n".join(not_shown)]
    return "\n\n".join([*parts, "**Not tested** at all:", _NEVER_TESTED])


def needed_table(metrics: Metrics, confidence_level: float, sizes: Sequence[float] = (0.05, 0.1, 0.2)) -> pd.DataFrame:
    """Return how many questions each metric from 0 to 1 needs to show the difference found, and ones of the given sizes.

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
        of_sizes = {f"for {size:.2f}": number for size, number in zip(sizes, needed, strict=True)}
        lines.append({"metric": METRICS[name].label, "found": f"{found['value']:.2f}", "for that": found["needed"]} | of_sizes)
    table = pd.DataFrame(lines, columns=["metric", "found", "for that", *(f"for {size:.2f}" for size in sizes)]).set_index(
        "metric"
    )
    return table.astype(dict.fromkeys(table.columns[1:], "Int64"))


def metrics_table(metrics: Metrics) -> pd.DataFrame:
    """Return the comparison as a table: one line per metric, values with their intervals, and the verdict."""
    import pandas as pd

    lines = [
        {"metric": line.metric.label, "base": line.base, "tuned": line.tuned, "difference": line.difference}
        | {"verdict": line.verdict}
        for line in metric_lines(metrics)
    ]
    return pd.DataFrame(lines, columns=["metric", "base", "tuned", "difference", "verdict"]).set_index("metric")
