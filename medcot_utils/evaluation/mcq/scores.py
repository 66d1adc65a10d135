"""Scores of multiple-choice answers by task and specialty, of base and tuned model, next to published scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from medcot_utils.evaluation.comparison import ComparedMetric, compare_shares
from medcot_utils.evaluation.intervals import (
    FEWEST_QUESTIONS,
    Array,
    Estimate,
    PairedCounts,
    count_pairs,
    estimate_share,
    format_interval,
)
from medcot_utils.evaluation.mcq.readings import MEASURES, Reading, is_right, read_pairs, right_column
from medcot_utils.machine.paths import PACKAGE

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from medcot_utils.config import DatasetSettings, EvaluationSettings
    from medcot_utils.evaluation.mcq.run import McqAnswer

# (task, id) of a question.
McqKey = tuple[str, str]
PUBLISHED = PACKAGE / "data" / "published_scores.json"
# Most models have a published score on this task, so it is shown if no task that was asked has published scores.
_FOR_ORIENTATION = "medqa"


class McqShare(Estimate):
    """Hold a share of multiple-choice questions with Wilson's interval.

    stderr: lm-eval's standard error, the sample's standard deviation divided by the square root of n; None for a single
    question."""

    stderr: float | None


class McqScores(TypedDict):
    """Hold the scores of one model on `n` questions."""

    n: int
    accuracy: McqShare  # an abstained question is not right
    abstained: McqShare


class PairedMcq(ComparedMetric, PairedCounts):
    """Hold a compared metric of multiple choice, with the counts that McNemar's exact test uses."""


def score_answers(records: Sequence[McqAnswer], confidence_level: float = 0.95) -> McqScores:
    """Return the shares of right and abstained answers. Raises ValueError without records."""
    if not records:
        raise ValueError("no records: run_tasks gives one per question")
    right, abstained = ([int(record[key]) for record in records] for key in ("correct", "abstained"))
    return {
        "n": len(records),
        "accuracy": _share(right, confidence_level),
        "abstained": _share(abstained, confidence_level),
    }


def _share(values: Sequence[int] | Array, confidence_level: float) -> McqShare:
    from lm_eval.api.metrics import mean_stderr

    stderr = mean_stderr(values) if len(values) > 1 else None
    return {**estimate_share(np.array(values), confidence_level), "stderr": stderr}


def overview(records: Sequence[McqAnswer]) -> dict[str, str]:
    """Return one model's scores as text for a table: {task and reading: share right, number of questions, share abstained}."""
    found = {}
    for task, chosen in _by(records, "task").items():
        abstained = score_answers(chosen)["abstained"]["value"]
        for reading in MEASURES:
            if read := [record for record in chosen if is_right(record, reading) is not None]:
                share = f"{right_column(read, reading).mean():.2f} right of {len(read)} questions"
                found[f"{task}, {reading}"] = share + (f", {abstained:.2f} abstained" if reading == "strict" else "")
    return found or {"multiple choice": "no questions asked (evaluation.mcq_tasks)"}


def _by(records: Sequence[McqAnswer], key: Literal["task", "specialty"]) -> dict[str, list[McqAnswer]]:
    groups: dict[str, list[McqAnswer]] = {}
    for record in records:
        groups.setdefault(record[key] or "", []).append(record)
    return groups


def specialty_table(base: Sequence[McqAnswer], tuned: Sequence[McqAnswer]) -> pd.DataFrame | str:
    """Return both models' strict accuracy and abstentions, one line per specialty with at least FEWEST_QUESTIONS questions.

    If there is no such specialty, return a line that says so. Accuracy has its 95 % Wilson interval. lm-eval's standard error
    has its own column."""
    import pandas as pd

    ours, theirs = _by(base, "specialty"), _by(tuned, "specialty")
    chosen = sorted(name for name, records in theirs.items() if name and len(records) >= FEWEST_QUESTIONS)
    if not chosen:
        most = max(map(len, theirs.values()), default=0)
        return f"No table by specialty: none has {FEWEST_QUESTIONS} questions (at most {most}), and fewer can show nothing."
    lines = []
    for name in chosen:
        line: dict[str, str | int] = {"specialty": name, "n": len(theirs[name])}
        for label, records in (("base", ours[name]), ("tuned", theirs[name])):
            share = score_answers(records)["accuracy"]
            line[f"{label}: right"] = format_interval(share)
            line[f"{label}: stderr"] = f"{share['stderr']:.2f}"
            line[f"{label}: abstained"] = sum(bool(record["abstained"]) for record in records)
        lines.append(line)
    return pd.DataFrame(lines).set_index("specialty")


# --- base and tuned --------------------------------------------------------------------------------------------------


def compare_records(
    base: Sequence[McqAnswer],
    tuned: Sequence[McqAnswer],
    settings: EvaluationSettings,
    key: Reading | Literal["abstained"] = "strict",
) -> PairedMcq:
    """Compare two models by one reading of their answers, or by which questions they abstained from.

    Raises ValueError unless both answered the same questions in the same order."""
    if [(r["task"], r["id"]) for r in base] != [(r["task"], r["id"]) for r in tuned]:
        raise ValueError("base and tuned records are of different questions: use the same task, limit, and seed for both")
    ours, theirs = (_column(records, key) for records in (base, tuned))
    return {**count_pairs(ours, theirs), **compare_shares(ours, theirs, settings)}


def _column(records: Sequence[McqAnswer], key: Reading | Literal["abstained"]) -> Array:
    if key == "abstained":
        return np.array([record["abstained"] for record in records], dtype=float)
    return right_column(records, key)


def seen_in_training(records: Sequence[McqAnswer], train: Dataset, settings: DatasetSettings) -> set[McqKey]:
    """Return the questions that a training row repeats, as `contamination.find_repeats` finds them."""
    from medcot_utils.data.contamination import find_repeats

    if not records:
        return set()
    keys = [(record["task"], record["id"]) for record in records]
    asked = [{"id": str(index), "Question": record["question"]} for index, record in enumerate(records)]
    return {keys[int(repeat["question_id"])] for repeat in find_repeats(train, asked, settings)}


def split_seen(records: Sequence[McqAnswer], seen: set[McqKey]) -> tuple[list[McqAnswer], list[McqAnswer]]:
    """Split answers into (those to questions not in `seen`, those to questions in it)."""
    clean = [record for record in records if (record["task"], record["id"]) not in seen]
    return clean, [record for record in records if (record["task"], record["id"]) in seen]


def compare_mcq(
    base: Sequence[McqAnswer], tuned: Sequence[McqAnswer], seen: set[McqKey], settings: EvaluationSettings
) -> dict[str, PairedMcq]:
    """Compare two models on the questions not in `seen`, by each reading (see `readings.MEASURES`).

    mcq_accuracy and mcq_abstained come from the strict reading, mcq_letter and mcq_likelihood from the readings of those names.
    mcq_accuracy_answered is the strict accuracy over the questions that both models answered. A metric is left out if no
    question has that reading for both models."""
    clean = [split_seen(records, seen)[0] for records in (base, tuned)]
    if not clean[0]:
        return {}
    found = {
        "mcq_accuracy": compare_records(*clean, settings),
        "mcq_abstained": compare_records(*clean, settings, key="abstained"),
    }
    for reading in ("letter", "likelihood"):
        if pairs := read_pairs(*clean, reading):
            found[f"mcq_{reading}"] = compare_records(*zip(*pairs, strict=True), settings, key=reading)
    both = [pair for pair in zip(*clean, strict=True) if not any(record["abstained"] for record in pair)]
    if both:
        found["mcq_accuracy_answered"] = compare_records(*zip(*both, strict=True), settings)
    return found


# --- published -------------------------------------------------------------------------------------------------------


def published_scores(base: Sequence[McqAnswer], tuned: Sequence[McqAnswer]) -> pd.DataFrame:
    """Return our own and published scores (`PUBLISHED`) for each task that was asked and has any; indexed by task and model.

    Published scores come from generated answers, so they compare with our strict and letter readings. Our likelihood reading
    compares with leaderboards of lm-eval's multiple-choice tasks; the column `scoring` says so. Accuracy is a share with its
    95 % Wilson interval. If no task has published scores, MedQA's are shown for orientation, without our own."""
    import pandas as pd

    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    ours = {"base": _by(base, "task"), "tuned": _by(tuned, "task")}
    tasks = [task for task in ours["tuned"] if task in data["questions"]]
    lines = []
    for task in tasks or [_FOR_ORIENTATION]:
        for reading in MEASURES if tasks else ():
            lines += [line for label, groups in ours.items() for line in _own_line(task, label, groups[task], reading)]
        n = data["questions"][task]
        for entry in data["scores"]:
            right = round(entry[task] / 100 * n)
            share = estimate_share(np.repeat([1, 0], [right, n - right]), 0.95) | {"value": entry[task] / 100}
            lines.append(_line(task, entry["model"], share, **data["sources"][entry["source"]]))
    columns = ["task", "model", "accuracy", "low", "high", "n", "stderr", "abstained", "source", "scoring"]
    return pd.DataFrame(lines, columns=columns).set_index(["task", "model"])


def _own_line(task: str, label: str, records: Sequence[McqAnswer], reading: Reading) -> list[dict[str, str | float | None]]:
    """Return a model's line for one reading; an empty list if no answer has that reading."""
    read = [record for record in records if is_right(record, reading) is not None]
    if not read:
        return []
    share = _share(right_column(read, reading), 0.95)
    abstained = {"abstained": score_answers(read)["abstained"]["value"]} if reading == "strict" else {}
    line = _line(task, f"{label}, {reading}", share, "this run", f"{reading}: {MEASURES[reading]}")
    return [line | {"stderr": share["stderr"]} | abstained]


def _line(task: str, model: str, share: Estimate, source: str, scoring: str) -> dict[str, str | float | None]:
    found = {"task": task, "model": model, "accuracy": share["value"], "low": share["low"], "high": share["high"]}
    return found | {"n": share["n"], "source": source, "scoring": scoring}
