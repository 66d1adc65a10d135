"""Figures of whatever was measured: what is absent, or no number, is left out and said."""

from __future__ import annotations

import math

import pytest

from medcot_utils.plots import band_figure, comparison_figure, loss_figure, to_data_uri

NOTHING = "none measured"
LOSS = {side: {"value": value, "low": None, "high": None} for side, value in (("base", 2.0), ("tuned", 1.5))}
BROKEN = LOSS | {"tuned": {"value": math.nan, "low": math.nan, "high": math.inf}}


def said(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ("metrics", "empty_panels", "bars"),
    [
        ({}, 3, 0),
        ({"eval_loss": LOSS}, 2, 2),
        ({"rouge_l": LOSS, "perplexity": LOSS}, 2, 2),
        ({"eval_loss": BROKEN, "answer_tokens": LOSS}, 1, 3),
        ({"eval_loss": dict.fromkeys(LOSS, BROKEN["tuned"])}, 3, 0),
    ],
    ids=["nothing", "loss alone", "one of four", "a loss that is no number", "nothing finite"],
)
@pytest.mark.filterwarnings("error")
def test_the_comparison_figure_shows_what_was_measured(metrics, empty_panels, bars):
    figure = comparison_figure(metrics)
    assert said(figure).count(NOTHING) == empty_panels
    assert sum(len(axes.patches) for axes in figure.axes) == bars
    assert to_data_uri(figure).startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    "log", [[], [{"step": 6, "train_loss": 1.5}], [{"step": 1, "loss": math.nan}]], ids=["empty", "end", "nan"]
)
@pytest.mark.filterwarnings("error")
def test_a_log_without_a_loss_makes_figures_that_say_so(log):
    for figure in (loss_figure(log), band_figure({10: (1.0, 2.0)}, log)):
        assert to_data_uri(figure)
    assert said(loss_figure([])) == ["no loss was logged"]
