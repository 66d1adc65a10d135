"""The tuned models of several runs compared with the first run's, on what all of them were asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medcot_utils.evaluation.comparison import MetricLine, compare_all, metric_lines
from medcot_utils.evaluation.headline import OF_ANSWERS, with_forced_closing
from medcot_utils.evaluation.mcq.readings import Reading, read_pairs
from medcot_utils.evaluation.mcq.scores import compare_records, seen_in_training
from medcot_utils.evaluation.scored_set import AnsweredQuestion, force_closing

if TYPE_CHECKING:
    from medcot_utils.config import EvaluationSettings
    from medcot_utils.evaluation.comparison import ComparedMetric
    from medcot_utils.evaluation.mcq.run import McqAnswer
    from medcot_utils.evaluation.side_by_side import Key, ShownRun
    from medcot_utils.models.losses import RowLoss
    from medcot_utils.run.directory import Run

_READINGS: tuple[Reading, ...] = ("letter", "likelihood")

# A multiple-choice question is the same in two runs only if all of it is: ids are often mere row numbers.
_McqKey = tuple[str, str, str, tuple[tuple[str, str], ...], str]
_Compared = Mapping[str, Mapping[str, "ComparedMetric"]]  # {model's label: {metric: compared with the first model's}}


@dataclass(frozen=True)
class TunedCompared:
    """Hold each run's tuned model compared with the first run's, on `n` questions.

    losses: whether the held-out loss is compared too. lines: for every metric, one line per other model, with the first run's
    as base; empty if there are no common questions. n_mcq: the number of multiple-choice questions that are compared.
    why_not: why nothing is; empty if something is."""

    n: int
    confidence: str
    labels: Sequence[str]
    losses: bool = False
    lines: Sequence[Sequence[MetricLine]] = ()
    n_mcq: int = 0
    why_not: str = ""


def compare_tuned(shown: Sequence[ShownRun], confidence: str) -> TunedCompared:
    """Compare the tuned models on the questions that all runs asked and scored and that no run trained on.

    The held-out loss is compared too if all runs measured it on the same rows, answers with forced closing if all runs have
    them, and multiple choice on the questions that all runs asked."""
    first = shown[0]
    keys = [key for key in first.questions if all(_counts(one, key) for one in shown)]
    names = [one.name for one in shown]
    labels = [f"tuned, {name}" for name in names]
    if not keys:
        return TunedCompared(0, confidence, labels, why_not=_explain_none(shown))
    questions = [
        AnsweredQuestion(first.questions[key], dict(zip(labels, (one.answers["tuned"][key] for one in shown), strict=True)), {})
        for key in keys
    ]
    losses = _common_losses(shown, labels)
    # Without embedding_similarity: it would load the embedding model again.
    settings = first.run.config.evaluation.model_copy(update={"embedding_model": None})
    lines = _lines(names, compare_all(questions, losses, settings, first.run.config.seed))
    if closed := force_closing(questions):
        forced = compare_all(closed, [], settings, first.run.config.seed)
        of_answers = {label: {name: metrics[name] for name in OF_ANSWERS} for label, metrics in forced.items()}
        lines += [[_named_forced(line) for line in row] for row in _lines(names, of_answers)]
    choice = _compare_choice(shown, labels, settings)
    lines += _lines(names, choice)
    n_mcq = max((metric["difference"]["n"] for metrics in choice.values() for metric in metrics.values()), default=0)
    return TunedCompared(len(keys), confidence, labels, bool(losses), lines, n_mcq)


def _lines(names: Sequence[str], compared: _Compared) -> list[Sequence[MetricLine]]:
    """Return, for every metric, one line per run but the first. A verdict names the runs whose cut answers could undo it."""
    first, *others = names
    lines = (metric_lines(found, (first, name)).values() for name, found in zip(others, compared.values(), strict=True))
    return list(zip(*lines, strict=True))


def _named_forced(line: MetricLine) -> MetricLine:
    return replace(line, metric=replace(line.metric, text=with_forced_closing(line.metric.text)))


def _counts(shown: ShownRun, key: Key) -> bool:
    return key in shown.answers["tuned"] and bool(shown.questions[key]["scored"]) and key[0] not in shown.seen


def _explain_none(shown: Sequence[ShownRun]) -> str:
    """Return why no question can be compared: the runs asked different ones, or trained on those that they share."""
    asked = {one.name: {key for key, question in one.questions.items() if question["scored"]} for one in shown}
    if common := set.intersection(*asked.values()):
        return f"a run trained on, or did not answer, each of the {len(common)} questions that all runs asked and scored"
    each = ", ".join(f"{name}: {len(keys)}" for name, keys in asked.items())
    return f"no question was asked and scored in all of the runs (scored questions: {each})"


def _common_losses(shown: Sequence[ShownRun], labels: Sequence[str]) -> list[RowLoss]:
    """Return the tuned models' losses on the held-out rows that no run trained on; none unless all runs have the same rows."""
    rows = {one.run.manifest()["artifacts"].get("held_out_rows", {}).get("sha256") for one in shown}
    if len(rows) > 1 or rows == {None}:
        return []
    seen = set.union(*(one.seen for one in shown))
    return [
        record | {"model": label}
        for label, one in zip(labels, shown, strict=True)
        for record in one.run.read("held_out_loss")
        if record["model"] == "tuned" and str(record["id"]) not in seen
    ]


# --- multiple choice -------------------------------------------------------------------------------------------------


def _compare_choice(shown: Sequence[ShownRun], labels: Sequence[str], settings: EvaluationSettings) -> _Compared:
    """Return the letter and likelihood readings on the questions that all runs asked, with that reading, and none trained on."""
    answers = [_choice_answers(one.run) for one in shown]
    common = [key for key in answers[0] if all(key in one for one in answers)]
    found: dict[str, dict[str, ComparedMetric]] = {label: {} for label in labels[1:]}
    for reading in _READINGS:
        keys = [key for key in common if all(reading in one[key] for one in answers)]
        first, *others = ([one[key] for key in keys] for one in answers)
        for label, records in zip(labels[1:], others, strict=True):
            if pairs := read_pairs(first, records, reading):
                found[label][f"mcq_{reading}"] = compare_records(*zip(*pairs, strict=True), settings, key=reading)
    return found


def _choice_answers(run: Run) -> dict[_McqKey, McqAnswer]:
    """Return {question: the tuned model's answer} without the questions that a training row repeats; empty if none was asked."""
    if "tuned_mcq" not in run.manifest()["artifacts"]:
        return {}
    records: list[McqAnswer] = run.read("tuned_mcq")
    counted = run.read("metrics")["metrics"].get("mcq_accuracy")
    seen = set()
    # The search takes a while, so it is done only if notebook 06 found some.
    if (counted["difference"]["n"] if counted else 0) < len(records):
        seen = seen_in_training(records, run.read("train_rows"), run.config.dataset)
    return {_key(record): record for record in records if (record["task"], record["id"]) not in seen}


def _key(record: McqAnswer) -> _McqKey:
    return record["task"], str(record["id"]), record.get("question", ""), tuple(record["options"].items()), record["answer"]
