"""Numbers from multiple-choice records: by task and specialty, base beside tuned, beside published scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medcot_utils.evaluation.comparison import compare_rates
from medcot_utils.evaluation.intervals import format_interval, rate
from medcot_utils.machine.paths import PACKAGE

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from medcot_utils.config import DatasetSettings, EvaluationSettings

Records = Sequence[Mapping[str, Any]]
PUBLISHED = PACKAGE / "data" / "published_scores.json"
# What is published for most models, and so what is shown where no task was asked that has published scores.
_FOR_ORIENTATION = "medqa"
_STRICT = "one reading, of the asked form only; an unread answer is not right"


def accuracy(records: Records, confidence_level: float = 0.95) -> dict[str, Any]:
    """n, and the shares `accuracy` (abstained counts as not right) and `abstained`, each {value, low, high, stderr, n}.

    low and high: Wilson's interval. stderr: lm-eval's own, the sample's standard deviation over the root of n; None for a
    single question. Raises ValueError without records."""
    if not records:
        raise ValueError("no records: run_mcq gives one per question")
    return {"n": len(records)} | {
        name: _share([int(record[key]) for record in records], confidence_level)
        for name, key in (("accuracy", "correct"), ("abstained", "abstained"))
    }


def _share(values: Sequence[int], confidence_level: float) -> dict[str, Any]:
    from lm_eval.api.metrics import mean_stderr

    return rate(np.array(values), confidence_level) | {"stderr": mean_stderr(values) if len(values) > 1 else None}


def overview(records: Records) -> dict[str, str]:
    """{task and its number of questions: right and abstained, as shares}, for a look at one model."""
    found = {}
    for task, chosen in _by(records, "task").items():
        shares = accuracy(chosen)
        right, abstained = (shares[name]["value"] for name in ("accuracy", "abstained"))
        found[f"{task}, {len(chosen)} questions"] = f"{right:.2f} right, {abstained:.2f} abstained"
    return found or {"multiple choice": "no questions asked (evaluation.mcq_tasks)"}


def _by(records: Records, key: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key] or "", []).append(record)
    return groups


def scores_table(base: Records, tuned: Records, by: Literal["task", "specialty"]) -> pd.DataFrame:
    """One line per task or specialty: n, and for both models accuracy with its 95 % Wilson interval and lm-eval's standard
    error (in brackets, on its own), and the number abstained. No line without records."""
    import pandas as pd

    groups, lines = (_by(base, by), _by(tuned, by)), []
    for name in sorted(groups[1]):
        line: dict[str, Any] = {by: name, "n": len(groups[1][name])}
        for label, group in zip(("base", "tuned"), groups, strict=True):
            share = accuracy(group[name])["accuracy"]
            stderr = "" if share["stderr"] is None else f"{share['stderr']:.2f}"
            abstained = sum(bool(record["abstained"]) for record in group[name])
            line |= {f"{label}: right": format_interval(share), f"{label}: stderr": stderr, f"{label}: abstained": abstained}
        lines.append(line)
    sides = [f"{label}: {what}" for label in ("base", "tuned") for what in ("right", "stderr", "abstained")]
    return pd.DataFrame(lines, columns=[by, "n", *sides]).set_index(by)


# --- base and tuned --------------------------------------------------------------------------------------------------


def paired(base: Records, tuned: Records, settings: EvaluationSettings, key: str = "correct") -> dict[str, Any]:
    """Two models on the same questions: n, both, only_base, only_tuned, neither (counts of `key`: correct or abstained), and
    base, tuned and difference as `evaluation.compare_rates` gives them. Raises ValueError for unlike questions."""
    if [(r["task"], r["id"]) for r in base] != [(r["task"], r["id"]) for r in tuned]:
        raise ValueError("base and tuned records are of different questions: same task, limit and seed for both")
    b, t = (np.array([record[key] for record in records], dtype=float) for records in (base, tuned))
    counts = {
        "n": len(b),
        "both": int((b * t).sum()),
        "only_base": int((b * (1 - t)).sum()),
        "only_tuned": int(((1 - b) * t).sum()),
        "neither": int(((1 - b) * (1 - t)).sum()),
    }
    return counts | compare_rates(b, t, settings)


def seen_in_training(records: Records, train: Dataset, settings: DatasetSettings) -> set[tuple[str, str]]:
    """{(task, id)} of the questions that a training row repeats, as `contamination.find_repeats` finds them."""
    from medcot_utils.data.contamination import find_repeats

    if not records:
        return set()
    keys = [(record["task"], record["id"]) for record in records]
    asked = [{"id": str(index), "Question": record["question"]} for index, record in enumerate(records)]
    return {keys[int(repeat["question_id"])] for repeat in find_repeats(train, asked, settings)}


def split_seen(records: Records, seen: set[tuple[str, str]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(records of questions that no training row repeats, the others)."""
    clean = [record for record in records if (record["task"], record["id"]) not in seen]
    return clean, [record for record in records if (record["task"], record["id"]) in seen]


def compare_mcq(
    base: Records, tuned: Records, seen: set[tuple[str, str]], settings: EvaluationSettings
) -> dict[str, dict[str, Any]]:
    """{mcq_accuracy, mcq_abstained, mcq_accuracy_answered}, each as `paired` gives it, over the questions not in `seen`, the
    last over those of them that both models answered; without what no question is left for."""
    clean = [split_seen(records, seen)[0] for records in (base, tuned)]
    if not clean[0]:
        return {}
    found = {name: paired(*clean, settings, key) for name, key in (("mcq_accuracy", "correct"), ("mcq_abstained", "abstained"))}
    both = [pair for pair in zip(*clean, strict=True) if not any(record["abstained"] for record in pair)]
    return found | ({"mcq_accuracy_answered": paired(*zip(*both, strict=True), settings)} if both else {})


# --- published -------------------------------------------------------------------------------------------------------


def published_scores(base: Records, tuned: Records) -> pd.DataFrame:
    """Published scores (`PUBLISHED`) of each task that was asked and has any, below our own of that task alone: accuracy with
    its 95 % Wilson interval, standard error and share abstained (our own), n, source, and how it was scored. Where none
    has any: MedQA's, for orientation, without our own. Indexed by task and model."""
    import pandas as pd

    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    ours = [(label, _by(records, "task")) for label, records in (("base", base), ("tuned", tuned))]
    tasks = [task for task in ours[1][1] if task in data["questions"]]
    lines = []
    for task in tasks or [_FOR_ORIENTATION]:
        for label, groups in ours if tasks else []:
            found = accuracy(groups[task])
            own = {"stderr": found["accuracy"]["stderr"], "abstained": found["abstained"]["value"]}
            lines.append(_line(task, label, found["accuracy"], "this run", _STRICT) | own)
        n = data["questions"][task]
        for entry in data["scores"]:
            right = round(entry[task] / 100 * n)
            share = rate(np.array([1] * right + [0] * (n - right)), 0.95) | {"value": entry[task] / 100}
            lines.append(_line(task, entry["model"], share, **data["sources"][entry["source"]]))
    columns = ["task", "model", "accuracy", "low", "high", "n", "stderr", "abstained", "source", "scoring"]
    return pd.DataFrame(lines, columns=columns).set_index(["task", "model"])


def _line(task: str, model: str, share: Mapping[str, Any], source: str, scoring: str) -> dict[str, Any]:
    found = {"task": task, "model": model, "accuracy": share["value"], "low": share["low"], "high": share["high"]}
    return found | {"n": share["n"], "source": source, "scoring": scoring}
