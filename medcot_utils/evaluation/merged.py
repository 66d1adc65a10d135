"""Whether the merged model, which people load, behaves like the 4-bit model that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import EvaluationSettings
from medcot_utils.evaluation.comparison import (
    Labels,
    Metrics,
    compare,
    count_of,
    describe_cut,
    format_side,
    is_shown,
    metrics_table,
    verdict,
)
from medcot_utils.evaluation.decisions import CANNOT_TELL, SMALLEST
from medcot_utils.evaluation.intervals import FEWEST_QUESTIONS, questions_needed_within, share_questions_needed_within
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.evaluation.scored_set import force_closing

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.evaluation.comparison import ComparedMetric
    from medcot_utils.evaluation.scored_set import AnsweredQuestion
    from medcot_utils.models.losses import RowLoss

LABELS: Labels = ("measured (4-bit)", "merged")
AS_MEASURED, DIFFERS = "behaves as measured", "differs"
Behaves = Literal["yes", "no", "can't tell"]
# The smallest difference that counts between the measured and the merged model: a reader who loads it notices if one answer in
# ten no longer closes its thinking or no longer ends, and if answers are a tenth longer or shorter. For the loss, the margin is
# that of the claims: 0.01 nats are 1 % of perplexity, ten times the effect of batching and rounding.
_NOTICED_SHARE, _NOTICED_LENGTH = 0.1, 0.1
# {metric: what it says about the model}
_JUDGED = {"closed_think_rate": "form", "finished_rate": "form", "completion_words": "length", "eval_loss": "loss"}


class MergedVerdict(TypedDict):
    """Hold whether the merged model differs in one metric by `margin` or more, which is in the metric's own units.

    needed: how many questions or rows would decide it; None if these do, if more would not, or if these are too few to tell."""

    about: str  # form, length or loss
    metric: str  # a key of METRICS
    verdict: str  # behaves as measured; differs, and how; or can't tell, and why
    margin: float | None  # None if the metric was not measured
    n: int
    needed: int | None


class MergedMeasured(TypedDict):
    """Hold the content of merged_metrics.json: the measured 4-bit model beside the merged one, on the same questions.

    n_questions: the number of counted questions that the merged model answered; 0 if its answers were not measured.
    metrics, forced: the metrics of greedy answers and of the loss, as in `Measured`. In each, `base` is the measured 4-bit
    model and `tuned` is the merged model.
    same_answers: the number of questions that both models answered word for word the same.
    not_measured: why the merged model was not asked, as in `needs 15.0 GiB`; None if it was asked.
    behaves: whether the model that people load behaves as measured. summary: the same for form, length, and loss in
    one line, with the reasons."""

    n_questions: int
    metrics: Metrics
    forced: NotRequired[Metrics]
    same_answers: int
    not_measured: str | None
    verdicts: Sequence[MergedVerdict]
    behaves: Behaves
    summary: str


def compare_merged(
    questions: Sequence[AnsweredQuestion],
    losses: Sequence[RowLoss],
    settings: EvaluationSettings,
    seed: int,
    not_measured: str | None = None,
) -> MergedMeasured:
    """Compare the merged model with the measured one.

    Args:
        questions: the counted questions of `score_merged`, with greedy answers labeled `tuned` and `merged`; empty if the
            merged model was not asked.
        losses: both models' losses on the same held-out rows, with the same labels, without rows that training rows repeat.
        not_measured: why the merged model was not asked.

    Raises:
        ValueError: if the models' losses are of different rows."""
    models = ("tuned", "merged")
    metrics = compare(questions, losses, settings, seed, models)
    forced = compare(force_closing(questions), [], settings, seed, models)
    verdicts = [_judge(name, metrics.get(name), settings.confidence_level, not_measured) for name in _JUDGED]
    same = sum(one.greedy["tuned"]["completion"] == one.greedy["merged"]["completion"] for one in questions)
    measured: MergedMeasured = {
        "n_questions": len(questions),
        "metrics": metrics,
        "same_answers": same,
        "not_measured": not_measured,
        "verdicts": verdicts,
        "behaves": _behaves(verdicts),
        "summary": _summarize(verdicts),
    }
    return {**measured, "forced": forced} if forced else measured


def _judge(name: str, metric: ComparedMetric | None, level: float, not_measured: str | None) -> MergedVerdict:
    found: MergedVerdict = {"about": _JUDGED[name], "metric": name, "verdict": "", "margin": None, "n": 0, "needed": None}
    if metric is None:
        return found | {"verdict": f"{CANNOT_TELL}: not measured" + (f", {not_measured}" if not_measured else "")}
    difference, margin = metric["difference"], _margin(name, metric)
    found |= {"margin": margin, "n": difference["n"]}
    cannot_tell = f"{CANNOT_TELL} with {count_of(name, difference['n'])}"
    if difference["n"] < FEWEST_QUESTIONS:
        return found | {"verdict": f"{cannot_tell}: at least {FEWEST_QUESTIONS} are needed"}
    if difference["low"] is None:
        return found | {"verdict": verdict(name, metric)}
    if is_shown(name, metric) and abs(difference["value"]) >= margin:
        sides = f"from {format_side(metric, 'base')} to {format_side(metric, 'tuned')}"
        return found | {"verdict": f"{DIFFERS}: {verdict(name, metric)}, {sides}"}
    if cut := describe_cut(name, metric, LABELS):
        return found | {"verdict": f"{cannot_tell}: {cut}"}
    if -margin < difference["low"] and difference["high"] < margin:
        return found | {"verdict": AS_MEASURED}
    needed = _needed(metric, margin, level)
    would = f"about {needed:,} would tell" if needed else "the difference found is near the smallest that counts"
    return found | {"verdict": f"{cannot_tell}: {would}", "needed": needed}


def _margin(name: str, metric: ComparedMetric) -> float:
    if METRICS[name].yes_or_no:
        return _NOTICED_SHARE
    return max(SMALLEST[name], _NOTICED_LENGTH * metric["base"]["value"] if name == "completion_words" else 0)


def _needed(metric: ComparedMetric, margin: float, level: float) -> int | None:
    """Return how many questions would show that the models differ by less than the margin or, if they do not, by more."""
    difference = metric["difference"]
    if abs(difference["value"]) >= margin:
        return difference["needed"]
    if "changed" in difference:
        return share_questions_needed_within(difference["changed"], difference["value"], margin, level)
    return questions_needed_within(difference["spread"], difference["value"], margin, level)


def _behaves(verdicts: Sequence[MergedVerdict]) -> Behaves:
    found = [one["verdict"] for one in verdicts]
    if any(text.startswith(DIFFERS) for text in found):
        return "no"
    return "yes" if all(text == AS_MEASURED for text in found) else "can't tell"


def _summarize(verdicts: Sequence[MergedVerdict]) -> str:
    """Return a question and, for form, length, and loss, its answer: what differs first, what these questions leave open last."""
    by_aspect: dict[str, list[MergedVerdict]] = {}
    for one in verdicts:
        by_aspect.setdefault(one["about"], []).append(one)
    aspects: dict[str, list[str]] = {}
    for about, found in by_aspect.items():
        aspects.setdefault(_answer(found), []).append(about)
    answers = sorted(aspects, key=lambda answer: (not answer.startswith("no,"), answer != "yes"))
    said = (f"{_listed(aspects[answer]).capitalize()}: {answer}." for answer in answers)
    return " ".join(["Does the merged model behave as measured?", *said])


def _answer(found: Sequence[MergedVerdict]) -> str:
    """Return what the verdicts on one aspect say together: `yes`, `no` with what differs, or why these questions can't tell."""
    if differing := [one for one in found if one["verdict"].startswith(DIFFERS)]:
        return f"no, {'; '.join(METRICS[one['metric']].text + one['verdict'].removeprefix(DIFFERS) for one in differing)}"
    undecided = [one for one in found if one["verdict"] != AS_MEASURED]
    if not undecided:
        return "yes"
    most = max(undecided, key=lambda one: one["needed"] or 0)
    if all(one["needed"] for one in undecided):
        return f"{count_of(most['metric'], most['n'])} are too few, {most['verdict'].partition(': ')[2]}"
    why = dict.fromkeys(one["verdict"].partition(": ")[2] or one["verdict"] for one in undecided if not one["needed"])
    return f"{CANNOT_TELL}, {'; '.join(why)}"


def _listed(aspects: Sequence[str]) -> str:
    return f"{', '.join(aspects[:-1])}, and {aspects[-1]}" if len(aspects) > 2 else " and ".join(aspects)


def merged_table(measured: MergedMeasured) -> pd.DataFrame:
    """Return `metrics_table` of the measured and the merged model, in both readings."""
    return metrics_table(measured["metrics"], measured.get("forced"), LABELS)


def merged_verdicts_table(measured: MergedMeasured) -> pd.DataFrame:
    """Return a table that says for each metric of form, length, and loss whether the merged model behaves as measured."""
    import pandas as pd

    lines = [
        {"about": one["about"], "metric": METRICS[one["metric"]].label, "verdict": one["verdict"]} for one in measured["verdicts"]
    ]
    return pd.DataFrame(lines).set_index(["about", "metric"])
