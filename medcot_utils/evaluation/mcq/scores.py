"""Scores of multiple-choice answers: by task and specialty, base beside tuned, beside published scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from medcot_utils.evaluation.comparison import ComparedMetric, compare_shares
from medcot_utils.evaluation.intervals import Estimate, PairedCounts, count_pairs, estimate_share, format_interval
from medcot_utils.machine.paths import PACKAGE

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from medcot_utils.config import DatasetSettings, EvaluationSettings
    from medcot_utils.evaluation.mcq.run import McqAnswer

# A question by its task and id.
McqKey = tuple[str, str]
PUBLISHED = PACKAGE / "data" / "published_scores.json"
# What is published for most models, and so what is shown where no task was asked that has published scores.
_FOR_ORIENTATION = "medqa"
_STRICT = "one reading, of the asked form only; an unread answer is not right"


class McqShare(Estimate):
    """Hold a share of multiple-choice questions with Wilson's interval.

    stderr: lm-eval's own, the sample's standard deviation over the root of n; None for a single question."""

    stderr: float | None


class McqScores(TypedDict):
    """Hold the scores of one model on `n` questions."""

    n: int
    accuracy: McqShare  # an abstained question is not right
    abstained: McqShare


class PairedMcq(ComparedMetric, PairedCounts):
    """Hold a compared metric of multiple choice, with the counts that McNemar's exact test is made of."""


def score_answers(records: Sequence[McqAnswer], confidence_level: float = 0.95) -> McqScores:
    """Return the shares of right and abstained answers. Raises ValueError without records."""
    if not records:
        raise ValueError("no records: run_mcq gives one per question")
    right, abstained = ([int(record[key]) for record in records] for key in ("correct", "abstained"))
    return {
        "n": len(records),
        "accuracy": _share(right, confidence_level),
        "abstained": _share(abstained, confidence_level),
    }


def _share(values: Sequence[int], confidence_level: float) -> McqShare:
    from lm_eval.api.metrics import mean_stderr

    stderr = mean_stderr(values) if len(values) > 1 else None
    return {**estimate_share(np.array(values), confidence_level), "stderr": stderr}


def overview(records: Sequence[McqAnswer]) -> dict[str, str]:
    """Return one model's shares as text, for a table: {task and its number of questions: right and abstained}."""
    found = {}
    for task, chosen in _by(records, "task").items():
        scores = score_answers(chosen)
        shares = f"{scores['accuracy']['value']:.2f} right, {scores['abstained']['value']:.2f} abstained"
        found[f"{task}, {len(chosen)} questions"] = shares
    return found or {"multiple choice": "no questions asked (evaluation.mcq_tasks)"}


def _by(records: Sequence[McqAnswer], key: Literal["task", "specialty"]) -> dict[str, list[McqAnswer]]:
    groups: dict[str, list[McqAnswer]] = {}
    for record in records:
        groups.setdefault(record[key] or "", []).append(record)
    return groups


def scores_table(base: Sequence[McqAnswer], tuned: Sequence[McqAnswer], by: Literal["task", "specialty"]) -> pd.DataFrame:
    """Return both models' accuracy and abstentions, one line per task or specialty; no line without records.

    Accuracy has its 95 % Wilson interval; lm-eval's standard error stands in a column of its own."""
    import pandas as pd

    ours, theirs = _by(base, by), _by(tuned, by)
    lines = []
    for name in sorted(theirs):
        line: dict[str, str | int] = {by: name, "n": len(theirs[name])}
        for label, records in (("base", ours[name]), ("tuned", theirs[name])):
            share = score_answers(records)["accuracy"]
            line[f"{label}: right"] = format_interval(share)
            line[f"{label}: stderr"] = "" if share["stderr"] is None else f"{share['stderr']:.2f}"
            line[f"{label}: abstained"] = sum(bool(record["abstained"]) for record in records)
        lines.append(line)
    sides = [f"{label}: {what}" for label in ("base", "tuned") for what in ("right", "stderr", "abstained")]
    return pd.DataFrame(lines, columns=[by, "n", *sides]).set_index(by)


# --- base and tuned --------------------------------------------------------------------------------------------------


def compare_records(
    base: Sequence[McqAnswer],
    tuned: Sequence[McqAnswer],
    settings: EvaluationSettings,
    key: Literal["correct", "abstained"] = "correct",
) -> PairedMcq:
    """Compare two models by one key of their answers. Raises ValueError unless both answered the same questions."""
    if [(r["task"], r["id"]) for r in base] != [(r["task"], r["id"]) for r in tuned]:
        raise ValueError("base and tuned records are of different questions: same task, limit and seed for both")
    ours, theirs = (np.array([record[key] for record in records], dtype=float) for records in (base, tuned))
    return {**count_pairs(ours, theirs), **compare_shares(ours, theirs, settings)}


def seen_in_training(records: Sequence[McqAnswer], train: Dataset, settings: DatasetSettings) -> set[McqKey]:
    """Return the questions that a training row repeats, as `contamination.find_repeats` finds them."""
    from medcot_utils.data.contamination import find_repeats

    if not records:
        return set()
    keys = [(record["task"], record["id"]) for record in records]
    asked = [{"id": str(index), "Question": record["question"]} for index, record in enumerate(records)]
    return {keys[int(repeat["question_id"])] for repeat in find_repeats(train, asked, settings)}


def split_seen(records: Sequence[McqAnswer], seen: set[McqKey]) -> tuple[list[McqAnswer], list[McqAnswer]]:
    """Split answers into (those to questions that no training row repeats, the others)."""
    clean = [record for record in records if (record["task"], record["id"]) not in seen]
    return clean, [record for record in records if (record["task"], record["id"]) in seen]


def compare_mcq(
    base: Sequence[McqAnswer], tuned: Sequence[McqAnswer], seen: set[McqKey], settings: EvaluationSettings
) -> dict[str, PairedMcq]:
    """Compare two models on the questions not in `seen`: mcq_accuracy, mcq_abstained and mcq_accuracy_answered.

    The last is over the questions that both models answered. A metric is left out if it has no question."""
    clean = [split_seen(records, seen)[0] for records in (base, tuned)]
    if not clean[0]:
        return {}
    found = {
        "mcq_accuracy": compare_records(*clean, settings),
        "mcq_abstained": compare_records(*clean, settings, key="abstained"),
    }
    both = [pair for pair in zip(*clean, strict=True) if not any(record["abstained"] for record in pair)]
    if both:
        found["mcq_accuracy_answered"] = compare_records(*zip(*both, strict=True), settings)
    return found


# --- published -------------------------------------------------------------------------------------------------------


def published_scores(base: Sequence[McqAnswer], tuned: Sequence[McqAnswer]) -> pd.DataFrame:
    """Return published scores (`PUBLISHED`) below our own, for each task that was asked and has any; indexed by task, model.

    Accuracy has its 95 % Wilson interval. If no task has published scores, MedQA's stand there for orientation, without our
    own."""
    import pandas as pd

    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    ours = {"base": _by(base, "task"), "tuned": _by(tuned, "task")}
    tasks = [task for task in ours["tuned"] if task in data["questions"]]
    lines = []
    for task in tasks or [_FOR_ORIENTATION]:
        for label, groups in ours.items() if tasks else ():
            scores = score_answers(groups[task])
            own = {"stderr": scores["accuracy"]["stderr"], "abstained": scores["abstained"]["value"]}
            lines.append(_line(task, label, scores["accuracy"], "this run", _STRICT) | own)
        n = data["questions"][task]
        for entry in data["scores"]:
            right = round(entry[task] / 100 * n)
            share = estimate_share(np.repeat([1, 0], [right, n - right]), 0.95) | {"value": entry[task] / 100}
            lines.append(_line(task, entry["model"], share, **data["sources"][entry["source"]]))
    columns = ["task", "model", "accuracy", "low", "high", "n", "stderr", "abstained", "source", "scoring"]
    return pd.DataFrame(lines, columns=columns).set_index(["task", "model"])


def _line(task: str, model: str, share: Estimate, source: str, scoring: str) -> dict[str, str | float | None]:
    found = {"task": task, "model": model, "accuracy": share["value"], "low": share["low"], "high": share["high"]}
    return found | {"n": share["n"], "source": source, "scoring": scoring}
