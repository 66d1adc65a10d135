"""The held-out loss of two models, and how much of its fall only makes up for rounding the base to 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import EvaluationSettings
from medcot_utils.evaluation.intervals import (
    FEWEST_QUESTIONS,
    Array,
    Difference,
    Estimate,
    estimate,
    format_interval,
    is_clear,
    ratio_of,
)
from medcot_utils.evaluation.paired import ComparedMetric, compare_statistics

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.models.losses import RowLoss


class LossBars(TypedDict):
    """Hold the held-out loss of three models on the same rows, in nats per trained token.

    rounding: the 4-bit base minus the 16-bit base, which is the cost of rounding.
    learning: the tuned model minus the 16-bit base.
    share: rounding divided by the fall from base to tuned; None if the loss did not clearly fall."""

    base_16bit: Estimate
    base: Estimate
    tuned: Estimate
    rounding: Difference
    learning: Difference
    share: Estimate | None


# The summed negative log-likelihoods and the numbers of tokens of one model's rows.
_Columns = tuple[Array, Array]


def compare_losses(
    losses: Sequence[RowLoss], models: tuple[str, str], settings: EvaluationSettings, seed: int
) -> dict[str, ComparedMetric]:
    """Return eval_loss (nats per trained token) and perplexity of two models; an empty dict unless both have losses.

    `models` are their labels. Raises ValueError if the losses are of different rows."""
    sides = _columns_of(losses, models)
    if not sides:
        return {}
    loss = _compare_loss(*sides, settings, seed)
    ours, theirs = (ratio_of(*columns) for columns in sides)
    perplexity = compare_statistics(
        lambda drawn: np.exp(ours(drawn)), lambda drawn: np.exp(theirs(drawn)), _changes(*sides), settings, seed
    )
    perplexity["difference"]["needed"] = loss["difference"]["needed"]  # perplexity is a function of the loss
    return {"eval_loss": loss, "perplexity": perplexity}


def compare_loss_bars(losses: Sequence[RowLoss], settings: EvaluationSettings, seed: int) -> LossBars | None:
    """Return the losses of 16-bit base, base, and tuned model, from records labeled `base_16bit`, `base`, and `tuned`.

    Return None if one of them was not measured. Raises ValueError if the three are of different rows."""
    sides = _columns_of(losses, ("base_16bit", "base", "tuned"))
    if not sides:
        return None
    whole, base, tuned = sides
    rounding, learning, fall = (_compare_loss(*pair, settings, seed) for pair in ((whole, base), (whole, tuned), (tuned, base)))
    of_whole, of_base, of_tuned = (ratio_of(*columns) for columns in sides)

    def share(drawn: Array) -> Array:
        return (of_base(drawn) - of_whole(drawn)) / (of_base(drawn) - of_tuned(drawn))

    fell = is_clear(fall["difference"]) and fall["difference"]["value"] > 0  # without a fall, its share is undefined
    return {
        "base_16bit": rounding["base"],
        "base": rounding["tuned"],
        "tuned": learning["tuned"],
        "rounding": rounding["difference"],
        "learning": learning["difference"],
        "share": estimate(share, len(whole[0]), settings, seed) if fell else None,
    }


def describe_share(bars: LossBars) -> str:
    """Return the share of the fall from base to tuned that makes up for rounding, or why there is none."""
    if bars["share"] is not None:
        return format_interval(bars["share"])
    if (n := bars["rounding"]["n"]) < FEWEST_QUESTIONS:
        return f"not computed: {n} held-out {'row' if n == 1 else 'rows'}, and at least {FEWEST_QUESTIONS} are needed"
    return "not computed: no fall from the 4-bit base to the tuned model is shown"


def losses_table(metrics: Mapping[str, ComparedMetric], bars: LossBars | None) -> pd.DataFrame:
    """Return a table of each model's loss and of the differences, with intervals, in nats per trained token."""
    import pandas as pd

    loss = metrics.get("eval_loss")
    lines: dict[str, Estimate] = {"16-bit base": bars["base_16bit"]} if bars else {}
    if loss:
        lines |= {"4-bit base": loss["base"], "tuned": loss["tuned"], "tuned minus 4-bit base": loss["difference"]}
    if bars:
        lines |= {
            "4-bit minus 16-bit base: what rounding had cost": bars["rounding"],
            "tuned minus 16-bit base: what was learned": bars["learning"],
        }
    shown = {name: format_interval(value) for name, value in lines.items()}
    if bars:
        shown["share of the fall that makes up for rounding"] = describe_share(bars)
    return pd.Series(shown, name="nats per token [interval]", dtype=object).to_frame()


def _columns_of(losses: Sequence[RowLoss], models: Sequence[str]) -> list[_Columns]:
    by_model = [[record for record in losses if record["model"] == model] for model in models]
    if not all(by_model):
        return []
    first, *others = [[record["id"] for record in records] for records in by_model]
    if any(ids != first for ids in others):
        raise ValueError(f"the losses of {' and '.join(models)} are of different rows: run notebooks 05 to 07 of one run")
    return [
        (np.array([one["nll"] for one in records], dtype=float), np.array([one["tokens"] for one in records], dtype=float))
        for records in by_model
    ]


def _compare_loss(base: _Columns, tuned: _Columns, settings: EvaluationSettings, seed: int) -> ComparedMetric:
    return compare_statistics(ratio_of(*base), ratio_of(*tuned), _changes(base, tuned), settings, seed)


def _changes(base: _Columns, tuned: _Columns) -> Array:
    # The loss weights a row by its tokens. The unweighted loss of each row is close enough for the spread over rows.
    return tuned[0] / tuned[1] - base[0] / base[1]
