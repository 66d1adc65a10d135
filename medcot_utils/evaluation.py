"""What fine-tuning did and did not do: held-out loss, format, style and similarity, each with an interval, paired."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcot_utils.config import EvaluationSettings

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel

Array = np.ndarray

# name -> (what it says, unit, which way is better: +1, -1, or 0 for neither)
METRICS: dict[str, tuple[str, str, int]] = {
    "eval_loss": ("held-out loss, per trained token", "nats", -1),
    "perplexity": ("held-out perplexity", "", -1),
    "closed_think_rate": ("one </think>, text on both sides", "share", 1),
    "finished_rate": ("answers that end by themselves", "share", 1),
    "thinking_tokens": ("length of the thinking", "tokens", 0),
    "answer_tokens": ("length of the answer", "tokens", 0),
    "bullet_rate": ("answers written as a list", "share", 0),
    "rouge_l": ("ROUGE-L of the answer against the reference", "F1", 1),
}


def row_losses(model: PreTrainedModel, rows: Dataset, batch_size: int, label: str) -> list[dict[str, Any]]:
    """Negative log-likelihood of each row's labels: one record {model, id, nll (nats, summed), tokens} per row.

    Rows carry input_ids and labels (-100 where no loss is taken), as notebook 03 makes them."""
    import torch
    from tqdm.auto import tqdm

    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    records: list[Any] = [None] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc=f"held-out loss, {label}", unit="batch"):
        chosen = order[start : start + batch_size]
        batch = [rows[i] for i in chosen]
        ids, labels, mask = (tensor.to(model.device) for tensor in _pad_right(batch))
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for position, i in enumerate(chosen):
            wanted = labels[position, 1:] != -100
            # Only the label positions become float32: a full copy of the logits would be the largest tensor of the step.
            picked = logits[position, :-1][wanted].float()
            nll = torch.nn.functional.cross_entropy(picked, labels[position, 1:][wanted], reduction="sum")
            records[i] = {"model": label, "id": rows[i]["id"], "nll": float(nll), "tokens": int(wanted.sum())}
    return records


def _pad_right(batch: Sequence[dict[str, Any]]) -> tuple[Any, Any, Any]:
    from torch import tensor
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([tensor(row["input_ids"]) for row in batch], batch_first=True)
    labels = pad_sequence([tensor(row["labels"]) for row in batch], batch_first=True, padding_value=-100)
    mask = pad_sequence([tensor([1] * len(row["input_ids"])) for row in batch], batch_first=True)
    return ids, labels, mask


_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


def is_bullet_list(answer: str) -> bool:
    """Two or more lines that begin with a bullet or a number: what the article says the base model does."""
    return len(_BULLET.findall(answer)) >= 2


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 (rouge-score, with stemming) of an answer against the reference response; 0 for an empty answer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure


def answer_columns(records: Sequence[dict[str, Any]], references: Sequence[str]) -> dict[str, Array]:
    """The per-question columns behind the metrics, from generation records and the reference responses beside them."""
    values = [
        {
            # Well formed: closed exactly once with text on both sides; a bare or doubled tag is no closed reasoning.
            "closed_think_rate": float(record["well_formed"]),
            "finished_rate": float(record["finished"]),
            "thinking_tokens": record["thinking_tokens"],
            "answer_tokens": record["answer_tokens"],
            "bullet_rate": float(is_bullet_list(record["answer"] or record["thinking"])),
            "rouge_l": rouge_l(record["answer"], reference),
        }
        for record, reference in zip(records, references, strict=True)
    ]
    return {name: np.array([row[name] for row in values], dtype=float) for name in values[0]}


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


def _three(single: Callable[..., Array], base: Sequence[Array], tuned: Sequence[Array], settings: EvaluationSettings, seed: int):
    def difference(*columns: Array, axis: int = -1) -> Array:
        half = len(columns) // 2
        return single(*columns[half:], axis=axis) - single(*columns[:half], axis=axis)

    return {
        "base": interval(single, base, settings, seed),
        "tuned": interval(single, tuned, settings, seed),
        "difference": interval(difference, (*base, *tuned), settings, seed),
    }


def compare(
    base_answers: Sequence[dict[str, Any]],
    tuned_answers: Sequence[dict[str, Any]],
    references: Sequence[str],
    losses: Sequence[dict[str, Any]],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every metric as {base, tuned, difference}, each {value, low, high, n}; the difference is tuned minus base, paired.

    Raises ValueError if the two models did not answer the same questions in the same order."""
    if [record["id"] for record in base_answers] != [record["id"] for record in tuned_answers]:
        raise ValueError("base and tuned answers are to different questions: run notebooks 02 and 06 of one run")
    base_loss, tuned_loss = ([record for record in losses if record["model"] == label] for label in ("base", "tuned"))
    columns = [
        [np.array([r[key] for r in records], dtype=float) for key in ("nll", "tokens")] for records in (base_loss, tuned_loss)
    ]

    def perplexity(nll: Array, tokens: Array, axis: int = -1) -> Array:
        return np.exp(_ratio(nll, tokens, axis=axis))

    metrics = {
        "eval_loss": _three(_ratio, *columns, settings, seed),
        "perplexity": _three(perplexity, *columns, settings, seed),
    }
    base, tuned = answer_columns(base_answers, references), answer_columns(tuned_answers, references)
    for name in base:
        metrics[name] = _three(np.mean, [base[name]], [tuned[name]], settings, seed)
    return metrics


def is_clear(difference: dict[str, Any]) -> bool:
    """True if the difference's interval lies wholly on one side of zero."""
    return difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)


def verdict(name: str, metric: dict[str, dict[str, Any]]) -> str:
    """In words, from the interval alone: rose, fell, or cannot be told apart with n questions."""
    difference = metric["difference"]
    if not is_clear(difference):
        return f"no difference shown with {difference['n']} questions"
    direction = "rose" if difference["value"] > 0 else "fell"
    better = METRICS[name][2]
    judged = "" if not better else ", better" if np.sign(difference["value"]) == better else ", worse"
    return direction + judged


def conclusions(metrics: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What the numbers do and do not show, as Markdown, computed from the intervals."""
    shown, not_shown = [], []
    for name, metric in metrics.items():
        difference = metric["difference"]
        if is_clear(difference):
            sides = f"from {format_interval(metric['base'])} to {format_interval(metric['tuned'])}"
            shown.append(f"- {METRICS[name][0]} **{verdict(name, metric)}**, {sides}")
        else:
            not_shown.append(f"- {METRICS[name][0]}: {verdict(name, metric)} ({format_interval(difference)})")
    never = (
        "- whether an answer is medically right: no metric here reads for that\n"
        "- anything about questions unlike these, or about patients"
    )
    parts = ["**Shown**, the interval of the difference lies clear of zero:", "\n".join(shown) or "- nothing"]
    if not_shown:
        parts += ["**Not shown**, the interval holds zero:", "\n".join(not_shown)]
    return "\n\n".join([*parts, "**Not tested** at all:", never])


def metrics_table(metrics: dict[str, dict[str, dict[str, Any]]]) -> pd.DataFrame:
    """The comparison as a reader wants it: one line a metric, values with their intervals, and the verdict."""
    import pandas as pd

    lines = []
    for name, metric in metrics.items():
        text, unit, _ = METRICS[name]
        cells = {side: format_interval(metric[side]) for side in ("base", "tuned", "difference")}
        lines.append({"metric": text + (f" ({unit})" if unit else ""), **cells, "verdict": verdict(name, metric)})
    return pd.DataFrame(lines).set_index("metric")


def format_interval(entry: dict[str, Any]) -> str:
    """`1.77 [1.70, 1.84]`, with digits to suit the size."""
    digits = 0 if abs(entry["value"]) >= 100 else 1 if abs(entry["value"]) >= 10 else 2
    if entry["low"] is None:
        return f"{entry['value']:.{digits}f}"
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
