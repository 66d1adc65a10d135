"""The readings of multiple choice, each compared with chance, and base with tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.evaluation.intervals import (
    Difference,
    Estimate,
    estimate_share,
    estimate_share_difference,
    format_interval,
)

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.config import EvaluationSettings
    from medcot_utils.evaluation.mcq.run import McqAnswer

Reading = Literal["strict", "letter", "likelihood"]

MEASURES: dict[Reading, str] = {
    "strict": 'knowledge and the asked form: a line "Answer: X" after one closed thinking; without it, the model abstained',
    "letter": 'knowledge after the model\'s own thinking, closed by it or for it: the likeliest letter after "Answer:"',
    "likelihood": "knowledge without thinking: the likeliest option's text, by its length (leaderboards' acc_norm)",
}
# Two likelihoods are equal if they differ only in the last digits, by rounding; scipy.stats.binomtest uses the same factor.
_AS_LIKELY = 1 + 1e-7


class ReadShare(Estimate):
    """Hold a model's share of right answers with Wilson's interval.

    p: the p-value against guessing among the options (`chance_p`). Abstained questions do not count in it, because nothing was
    guessed. None if all are abstained.
    abstained: the number of questions without a readable answer; only the strict reading can have any."""

    p: float | None
    abstained: int


class McqReading(TypedDict):
    """Hold one reading of a task's questions by both models.

    chance: the expected share of right answers from guessing among the options. difference: tuned minus base, with McNemar's
    exact p."""

    task: str
    reading: Reading
    measures: str
    n: int
    chance: float
    base: ReadShare
    tuned: ReadShare
    difference: Difference


def is_right(record: McqAnswer, reading: Reading) -> bool | None:
    """Return whether a reading of an answer is right; None if the answer lacks that reading, as in earlier runs."""
    if reading == "strict":
        return bool(record["correct"])
    return record[reading] == record["answer"] if reading in record else None


def read_pairs(base: Sequence[McqAnswer], tuned: Sequence[McqAnswer], reading: Reading) -> list[tuple[McqAnswer, McqAnswer]]:
    """Return the pairs of answers to one question that both have this reading. Raises ValueError for unequal lengths."""
    pairs = zip(base, tuned, strict=True)
    return [pair for pair in pairs if all(is_right(record, reading) is not None for record in pair)]


def right_column(records: Sequence[McqAnswer], reading: Reading) -> np.ndarray:
    """Return 1 for each answer that a reading finds right, else 0."""
    return np.array([bool(is_right(record, reading)) for record in records], dtype=float)


def chance_p(right: int, options: Sequence[int]) -> float:
    """Return the exact two-sided p of `right` right answers if each question is guessed among its number of options.

    If that number is the same for all questions, it is scipy.stats.binomtest. If not, it is the same sum over the Poisson
    binomial distribution: the probability of all counts that are no likelier than this one."""
    from scipy.stats import binomtest, poisson_binom

    if len(set(options)) == 1:
        return float(binomtest(right, len(options), 1 / options[0]).pvalue)
    likelihoods = poisson_binom([1 / number for number in options]).pmf(np.arange(len(options) + 1))
    return float(likelihoods[likelihoods <= likelihoods[right] * _AS_LIKELY].sum())


def compare_readings(base: Sequence[McqAnswer], tuned: Sequence[McqAnswer], settings: EvaluationSettings) -> list[McqReading]:
    """Return each reading of each task that both models' answers have; an empty list without answers.

    Both must hold the same questions in the same order (see `scores.split_seen`). A reading counts the questions that have it
    for both models."""
    found = []
    for task in dict.fromkeys(record["task"] for record in base):
        ours, theirs = ([record for record in records if record["task"] == task] for records in (base, tuned))
        for reading, measures in MEASURES.items():
            if not (pairs := read_pairs(ours, theirs, reading)):
                continue
            sides = [list(side) for side in zip(*pairs, strict=True)]
            columns = [right_column(side, reading) for side in sides]
            found.append(
                McqReading(
                    task=task,
                    reading=reading,
                    measures=measures,
                    n=len(pairs),
                    chance=float(np.mean([1 / len(record["options"]) for record in sides[0]])),
                    base=_read_share(sides[0], columns[0], reading, settings),
                    tuned=_read_share(sides[1], columns[1], reading, settings),
                    difference=estimate_share_difference(*columns, settings),
                )
            )
    return found


def _read_share(records: Sequence[McqAnswer], right: np.ndarray, reading: Reading, settings: EvaluationSettings) -> ReadShare:
    read = [record for record in records if not (reading == "strict" and record["abstained"])]
    p = chance_p(int(right.sum()), [len(record["options"]) for record in read]) if read else None
    return {**estimate_share(right, settings.confidence_level), "p": p, "abstained": len(records) - len(read)}


def readings_table(readings: Sequence[McqReading]) -> pd.DataFrame:
    """Return `compare_readings` as a table: for each task and reading, one line per model and one for their difference.

    The column p has a model's p against chance, and McNemar's p for the difference."""
    import pandas as pd

    lines: list[tuple[object, ...]] = []
    for one in readings:
        for side in ("base", "tuned"):
            share = one[side]
            p = "" if share["p"] is None else f"{share['p']:.3f}"
            measured = format_interval(share), f"{one['chance']:.2f}", p, share["abstained"]
            lines.append((one["task"], one["reading"], side, one["n"], *measured))
        difference = one["difference"]
        measured = format_interval(difference), "", f"{difference['p']:.3f}", ""
        lines.append((one["task"], one["reading"], "difference", one["n"], *measured))
    index = ["task", "reading", "model"]
    return pd.DataFrame(lines, columns=[*index, "questions", "right", "chance", "p", "abstained"]).set_index(index)
