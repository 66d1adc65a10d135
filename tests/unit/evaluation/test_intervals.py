"""Intervals, tests and numbers of questions: against known truth, published examples and simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.intervals import (
    estimate,
    estimate_all,
    estimate_share,
    estimate_share_difference,
    exact_p,
    exact_power,
    format_interval,
    half_questions_needed,
    is_clear,
    mean_of,
    questions_needed,
    questions_needed_within,
    ratio_of,
    share_questions_needed,
    share_questions_needed_within,
)

SETTINGS = load_config("smoke").evaluation  # 95 %, 500 resamples


# --- intervals -----------------------------------------------------------------------------------------------------


def test_the_interval_of_known_data():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = estimate(mean_of(values), 5, SETTINGS, 0)
    assert (found["value"], found["n"]) == (3.0, 5)
    # Student's, 2.776 standard errors of sqrt(2.5 / 5) on either side; the resamples' own tails are a little shorter.
    assert found["low"] == pytest.approx(3 - 1.96, abs=0.4) and found["high"] == pytest.approx(3 + 1.96, abs=0.4)


def test_one_question_has_a_value_and_no_interval():
    assert estimate(mean_of(np.array([4.0])), 1, SETTINGS, 0) == {"value": 4.0, "low": None, "high": None, "n": 1}


def test_the_interval_repeats_by_seed_and_widens_with_confidence():
    values = np.random.default_rng(3).normal(size=40)
    narrow = estimate(mean_of(values), 40, SETTINGS, 5)
    assert narrow == estimate(mean_of(values), 40, SETTINGS, 5)
    wide = estimate(mean_of(values), 40, SETTINGS.model_copy(update={"confidence_level": 0.99}), 5)
    assert wide["high"] - wide["low"] > 1.1 * (narrow["high"] - narrow["low"])


def drawn_lengths(n):
    return lambda generator: (mean_of(generator.normal(2.0, 3.0, size=n)), n)


def drawn_skewed_differences(n):
    # Questions differ by far more than the models do, and what the tuned adds is skewed.
    def draw(generator):
        base = generator.normal(200, 60, size=n)
        before, after = mean_of(base), mean_of(base + generator.gamma(2, 10, size=n))
        return lambda drawn: after(drawn) - before(drawn), n

    return draw


def drawn_losses(n):
    # Longer rows have a lower loss, so that the mean over rows (1.13) is not the loss per token.
    def draw(generator):
        tokens = generator.integers(50, 300, size=n).astype(float)
        return ratio_of(tokens * (2 - tokens / 200 + generator.normal(0, 0.3, size=n)), tokens), n

    return draw


_TOKENS = np.arange(50, 300)
LOSS = float((_TOKENS * (2 - _TOKENS / 200)).sum() / _TOKENS.sum())


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (drawn_lengths(12), 2.0),
        (drawn_lengths(24), 2.0),
        (drawn_skewed_differences(60), 20.0),
        (drawn_losses(24), LOSS),
    ],
    ids=["mean of 12", "mean of 24", "skewed difference of 60", "loss per token of 24"],
)
def test_a_95_percent_interval_covers_about_95_times_in_100(draw, truth):
    simulations, settings = 1500, SETTINGS.model_copy(update={"n_resamples": 1500})
    generator = np.random.default_rng(3407)
    hits = 0
    for index in range(simulations):
        found = estimate(*draw(generator), settings, index)
        hits += found["low"] <= truth <= found["high"]
    print(hits / simulations)
    assert 0.93 <= hits / simulations <= 0.97


@pytest.mark.simulation
def test_skewed_lengths_are_covered_as_notebook_06_says():
    generator, settings = np.random.default_rng(1), SETTINGS.model_copy(update={"n_resamples": 1000})
    hits = 0
    for index in range(800):
        found = estimate(mean_of(generator.lognormal(0, 1, size=24)), 24, settings, index)
        hits += found["low"] <= np.exp(0.5) <= found["high"]
    assert 0.85 <= hits / 800 <= 0.92


# --- shares --------------------------------------------------------------------------------------------------------


def test_a_shares_interval_is_wilsons_and_never_of_zero_width():
    found = estimate_share(np.array([1.0] * 24), 0.95)
    # Wilson with z = 1.96: n / (n + z^2) below, 1 above.
    assert (found["value"], found["high"], found["n"]) == (1, 1, 24) and found["low"] == pytest.approx(
        24 / (24 + 3.8415), abs=1e-4
    )
    assert estimate_share(np.array([0.0, 1.0]), 0.95)["low"] > 0


@pytest.mark.parametrize("truth", [0.04, 0.5, 0.96])
@pytest.mark.parametrize("n", [20, 24, 60])
def test_a_shares_interval_covers_it_also_near_0_and_1(truth, n):
    from scipy.stats import binom

    covered = 0.0
    for right in range(n + 1):  # every outcome with its probability: nothing is simulated
        found = estimate_share(np.array([1.0] * right + [0.0] * (n - right)), 0.95)
        covered += binom.pmf(right, n, truth) * (found["low"] <= truth <= found["high"])
    assert 0.93 <= covered <= 0.99


def columns(both, only_base, only_tuned, neither):
    counts = (both, only_base, only_tuned, neither)
    return [np.repeat(values, counts).astype(float) for values in ([1, 1, 0, 0], [1, 0, 1, 0])]


def test_the_interval_of_a_paired_difference_is_newcombes():
    # The example of Newcombe 1998, table II: 36 and 2 against 12 and 0 of 50; method 10 gives 0.0569 to 0.3404.
    found = estimate_share_difference(*columns(36, 2, 12, 0), SETTINGS)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert found["p"] == exact_p(*columns(36, 2, 12, 0)) and found["changed"] == pytest.approx(14 / 50)


def test_equal_answers_have_an_interval_that_shrinks_with_n():
    few, many = (estimate_share_difference(*columns(n, 0, 0, n), SETTINGS) for n in (10, 1000))
    assert few["low"] == -few["high"] < many["low"] < 0 == few["value"] and few["p"] == 1
    assert not is_clear(few)


@pytest.mark.parametrize("truth", [(0.0, 0.0, 0.96), (0.3, 0.1, 0.3), (0.05, 0.02, 0.2), (0.5, 0.15, 0.15)], ids=str)
@pytest.mark.parametrize("n", [24, 60])
def test_a_paired_interval_covers_as_often_as_it_says(truth, n, monkeypatch):
    monkeypatch.setattr("medcot_utils.evaluation.intervals.share_questions_needed", lambda *given: None)  # takes most of the time
    generator, hits = np.random.default_rng(5), 0
    for _ in range(1500):
        found = estimate_share_difference(*columns(*generator.multinomial(n, [*truth, 1 - sum(truth)])), SETTINGS)
        hits += found["low"] <= truth[2] - truth[1] <= found["high"]
    assert 0.92 <= hits / 1500 <= 0.99


# --- the exact test ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "p"),
    [
        ((0, 0, 0, 0), 1),
        ((8, 0, 0, 5), 1),
        ((0, 0, 1, 0), 1),
        ((0, 0, 3, 0), 2 / 8),
        ((0, 6, 0, 0), 2 / 64),
        ((7, 1, 5, 9), 2 * (1 + 6) / 64),
        ((0, 2, 10, 3), 2 * (1 + 12 + 66) / 4096),
        ((0, 10, 2, 3), 2 * (1 + 12 + 66) / 4096),
        ((5, 4, 4, 5), 1),
    ],
)
def test_the_exact_p_is_mcnemars_over_the_differing_questions(counts, p):
    assert exact_p(*columns(*counts)) == pytest.approx(p)


@pytest.mark.parametrize(
    ("low", "high", "test", "clear"),
    [
        (1.0, 1.0, {"p": 0.25, "alpha": 0.05}, False),
        (0.2, 0.9, {"p": 0.04, "alpha": 0.05}, True),
        (-0.9, -0.2, {"p": 0.04, "alpha": 0.05}, True),
        (0.2, 0.9, {"p": 0.04, "alpha": 0.01}, False),
        (0.0, 0.9, {"p": 0.001, "alpha": 0.05}, False),
        (-0.1, 0.9, {"p": 0.001, "alpha": 0.05}, False),
        (None, None, {"p": 0.001, "alpha": 0.05}, False),
        (None, None, {}, False),
        (0.2, 0.9, {}, True),
        (-0.1, 0.9, {}, False),
    ],
)
def test_a_clear_difference_needs_interval_and_exact_test(low, high, test, clear):
    assert is_clear({"value": 0.5, "low": low, "high": high, "n": 9} | test) is clear


# --- how many questions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "difference"), [(1.0, 0.3), (50.0, -20.0), (0.4, 0.05)])
def test_a_paired_test_has_80_percent_power_at_the_needed_number(spread, difference):
    from scipy.stats import ttest_rel

    n, generator = questions_needed(spread, difference), np.random.default_rng(7)
    base = generator.normal(100, 3 * spread, size=(2000, n))  # questions differ by more than the models do
    tuned = base + generator.normal(difference, spread, size=base.shape)
    assert 0.75 <= (ttest_rel(tuned, base, axis=1).pvalue < 0.05).mean() <= 0.85


def test_confidence_power_and_small_effects_need_more_questions():
    assert questions_needed(1.0, 0.5) == 32  # (1.960 + 0.842)^2 x 4 = 31.4
    assert questions_needed(1.0, 0.5, confidence_level=0.99) == 47  # (2.576 + 0.842)^2 x 4 = 46.7
    assert questions_needed(1.0, 0.5, power=0.9) == 43  # (1.960 + 1.282)^2 x 4 = 42.03
    assert questions_needed(1.0, 0.05) == 3140 and questions_needed(1.0, 5.0) == 6


def test_no_number_of_questions_shows_a_difference_that_is_none():
    assert questions_needed(1.0, 0.0) is None and questions_needed(0.0, 0.0) is None


@pytest.mark.parametrize(("changed", "size"), [(0.7, 0.7), (0.3, 0.3), (0.5, 0.2), (0.167, -0.167)])
def test_mcnemars_test_has_80_percent_power_at_the_needed_number(changed, size):
    n, generator = share_questions_needed(changed, size), np.random.default_rng(3)
    up, down = (changed + size) / 2, (changed - size) / 2
    clear = 0
    for only_base, only_tuned, neither in generator.multinomial(n, [down, up, 1 - changed], size=1500):
        clear += exact_p(*columns(0, only_base, only_tuned, neither)) < 0.05
    assert clear / 1500 == pytest.approx(exact_power(n, changed, size), abs=0.035)
    assert exact_power(n, changed, size) >= 0.8 > exact_power(max(6, int(0.75 * n)), changed, size)


@pytest.mark.parametrize(("spread", "difference", "margin"), [(0.3, 0.0, 0.1), (1.0, 0.1, 0.2)])
def test_at_the_needed_number_most_intervals_lie_within_the_margin(spread, difference, margin):
    n = questions_needed_within(spread, difference, margin)
    means = np.random.default_rng(5).normal(difference, spread / np.sqrt(n), size=4000)
    half = 1.96 * spread / np.sqrt(n)
    # Of a difference of 0 both ends must be within, which happens less often than the one end that is counted.
    within = ((means - half > -margin) & (means + half < margin)).mean()
    assert within == pytest.approx(0.8 if difference else 0.6, abs=0.03)
    assert questions_needed_within(spread, margin, margin) is None and questions_needed_within(0.0, 0.0, margin) is None


def test_of_unchanged_shares_wilsons_interval_gives_the_number():
    settings = SETTINGS
    for margin in (0.05, 0.1, 0.2):
        n = share_questions_needed_within(0.0, 0.0, margin)
        ends = [estimate_share_difference(*columns(k, 0, 0, 0), settings)["high"] for k in (n - 1, n)]
        assert ends[0] >= margin > ends[1]
    assert share_questions_needed_within(0.3, 0.1, 0.1) is None
    assert share_questions_needed_within(0.2, 0.05, 0.1) > share_questions_needed_within(0.1, 0.05, 0.1) > 100


def test_the_needed_number_shows_a_majority_in_four_of_five():
    for share in (0.6, 0.25):
        n = half_questions_needed(share)
        right = np.random.default_rng(6).binomial(n, share, size=2000)
        clear = [not (found["low"] <= 0.5 <= found["high"]) for k in right for found in [wilson(k, n)]]
        assert np.mean(clear) == pytest.approx(0.8, abs=0.06)
    assert half_questions_needed(0.5) is None and half_questions_needed(1.0) == 6


@cache
def wilson(k, n):
    return estimate_share(np.repeat([1, 0], [k, n - k]), 0.95)


def test_estimates_from_one_bootstrap_are_those_from_several():
    values = np.random.default_rng(2).normal(size=(3, 20))
    values[1, 3] = np.nan
    several = estimate_all([mean_of(column) for column in values], 20, SETTINGS, 7)
    for one, column in zip(several, values, strict=True):
        np.testing.assert_equal(one, estimate(mean_of(column), 20, SETTINGS, 7))
    assert [one["low"] is None for one in several] == [False, True, False]


def test_needed_questions_are_never_too_few_to_show_anything():
    assert share_questions_needed(1.0, 1.0) == 6 and share_questions_needed(0.3, 0.0) is None
    assert share_questions_needed(0.3, 0.05) > 900
    assert share_questions_needed(0.05, 0.2) == share_questions_needed(0.2, 0.2), (
        "models that differ on fewer cannot be so far apart"
    )


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((0.011, 0.002, 0.02), "0.011 [0.002, 0.020]"),
        ((-0.004, -0.0061, -0.0001), "-0.004 [-0.006, 0.000]"),
        ((0.011, -0.002, 0.02), "0.01 [0.00, 0.02]"),
        ((0.001, 0.0004, 0.002), "0.00 [0.00, 0.00]"),  # its verdict is: rose by less than 0.005
        ((1.01, 0.001, 2.2), "1.01 [0.00, 2.20]"),
        ((0.5, None, None), "0.50"),
    ],
)
def test_a_small_clear_difference_does_not_end_at_zero(entry, expected):
    assert format_interval(dict(zip(("value", "low", "high"), entry, strict=True), needed=9)) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((1.2345, 1.1, 1.399), "1.23 [1.10, 1.40]"),
        ((-0.005, -0.011, 0.004), "-0.01 [-0.01, 0.00]"),
        ((12.34, 9.95, 15.0), "12.3 [9.9, 15.0]"),
        ((-123.4, -150.5, -99.9), "-123 [-150, -100]"),
        ((0.5, None, None), "0.50"),
        ((250.4, None, None), "250"),
        ((0.0, -0.0002, 0.0003), "0.00 [0.00, 0.00]"),
    ],
)
def test_an_interval_is_written_with_digits_to_suit_its_size(entry, expected):
    assert format_interval(dict(zip(("value", "low", "high"), entry, strict=True))) == expected
