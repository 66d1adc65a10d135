"""The held-out loss of two models and of three: the same rows, and what of the fall rounding had cost."""

from __future__ import annotations

import numpy as np
import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.loss import compare_loss_bars, compare_losses, describe_share, losses_table

SETTINGS = load_config("smoke").evaluation  # 95 %, 500 resamples


def losses(n=40, noise=0.05, **values):
    """Records of models by their label and loss, on rows of uneven length."""
    generator, tokens = np.random.default_rng(1), np.random.default_rng(2).integers(50, 300, size=n)
    return [
        {"model": model, "id": f"h{i}", "nll": float(tokens[i] * (value + noise * generator.normal())), "tokens": int(tokens[i])}
        for model, value in values.items()
        for i in range(n)
    ]


def test_three_bars_say_how_much_of_the_fall_rounding_had_cost():
    found = compare_loss_bars(losses(base=4.0, tuned=3.2, base_16bit=3.6), SETTINGS, 7)
    assert [round(found[name]["value"], 1) for name in ("base_16bit", "base", "tuned", "rounding", "learning")] == [
        *(3.6, 4.0, 3.2, 0.4, -0.4)
    ]
    assert found["share"]["value"] == pytest.approx(0.5, abs=0.05)
    assert found["share"]["low"] < 0.5 < found["share"]["high"] and found["share"]["high"] - found["share"]["low"] < 0.1
    assert found["learning"]["high"] < 0 < found["rounding"]["low"] and found["learning"]["needed"] >= 6


def test_the_bars_are_the_metrics_own_numbers():
    held_out = losses(base=4.0, tuned=3.2, base_16bit=3.6)
    found, metrics = compare_loss_bars(held_out, SETTINGS, 7), compare_losses(held_out, ("base", "tuned"), SETTINGS, 7)
    assert (found["base"], found["tuned"]) == (metrics["eval_loss"]["base"], metrics["eval_loss"]["tuned"])


@pytest.mark.parametrize("tuned", [4.0, 4.3])
def test_of_a_loss_that_did_not_fall_there_is_no_share(tuned):
    found = compare_loss_bars(losses(base=4.0, tuned=tuned, base_16bit=3.6), SETTINGS, 7)
    assert found["share"] is None and found["rounding"]["value"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("n", "tuned", "why"),
    [
        (4, 3.2, "not computed: 4 held-out rows, and at least 6 are needed"),
        (1, 3.2, "not computed: 1 held-out row, and at least 6 are needed"),
        (40, 4.0, "not computed: no fall from the 4-bit base to the tuned model is shown"),
    ],
)
def test_a_share_that_is_not_computed_says_why(n, tuned, why):
    held_out = losses(n=n, base=4.0, tuned=tuned, base_16bit=3.6)
    found = compare_loss_bars(held_out, SETTINGS, 7)
    table = losses_table(compare_losses(held_out, ("base", "tuned"), SETTINGS, 7), found)
    assert describe_share(found) == table.iloc[-1, 0] == why


def test_without_the_16_bit_base_there_are_no_bars():
    held_out = losses(base=4.0, tuned=3.2)
    assert compare_loss_bars(held_out, SETTINGS, 7) is None
    assert compare_losses(held_out, ("base", "merged"), SETTINGS, 7) == {}


def test_losses_of_other_rows_are_refused():
    held_out = losses(base=4.0, tuned=3.2, base_16bit=3.6)[:-1]
    with pytest.raises(ValueError, match="losses of base_16bit and base and tuned are of different rows"):
        compare_loss_bars(held_out, SETTINGS, 7)
    assert compare_losses(held_out, ("base", "tuned"), SETTINGS, 7)
    with pytest.raises(ValueError, match="different rows: run notebooks 05 to 07 of one run"):
        compare_losses(held_out, ("base", "base_16bit"), SETTINGS, 7)
