"""Figures of whatever was measured: what is absent, or no number, is left out and said."""

from __future__ import annotations

import base64
import io
import itertools
import math

import made_up_measures
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from medcot_utils.plots import (
    ACCENT,
    BASE,
    MERGED,
    TUNED,
    band_figure,
    comparison_figure,
    describe_figure,
    loss_bars_figure,
    loss_figure,
    to_data_uri,
)

NOTHING = "none measured"
LOSS = {side: {"value": value, "low": None, "high": None} for side, value in (("base", 2.0), ("tuned", 1.5))}
BROKEN = LOSS | {"tuned": {"value": math.nan, "low": math.nan, "high": math.inf}}


def said(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ("metrics", "empty_panels", "bars"),
    [
        ({}, 5, 0),
        ({"eval_loss": LOSS}, 4, 2),
        ({"rouge_l": LOSS, "perplexity": LOSS}, 4, 2),
        ({"eval_loss": BROKEN, "answer_tokens": LOSS}, 3, 3),
        ({"eval_loss": dict.fromkeys(LOSS, BROKEN["tuned"])}, 5, 0),
        ({"mcq_accuracy": LOSS, "closed_think_rate": LOSS}, 3, 4),
    ],
    ids=["nothing", "loss alone", "one of four", "a loss that is no number", "nothing finite", "form and multiple choice"],
)
@pytest.mark.filterwarnings("error")
def test_the_comparison_figure_shows_what_was_measured(metrics, empty_panels, bars):
    figure = comparison_figure({"metrics": metrics})
    assert said(figure).count(NOTHING) == empty_panels
    assert sum(len(axes.patches) for axes in figure.axes) == bars
    assert to_data_uri(figure).startswith("data:image/png;base64,")


@pytest.mark.filterwarnings("error")
def test_a_title_or_label_with_dollar_signs_is_no_formula():
    planted = LOSS | {side: LOSS[side] | {"n": r"$\frac{$"} for side in ("base", "tuned")}
    figure = comparison_figure({"metrics": {"mcq_accuracy": planted}, "n_questions": r"$\frac{$"})
    assert to_data_uri(figure).startswith("data:image/png;base64,"), "a broken formula would end it"
    written = [axes.get_title() for axes in figure.axes]
    assert any(r"$\frac{$ questions" in title for title in written)


def bars(axes):
    """{color: heights of its bars} of a panel."""
    found = {}
    for bar in axes.patches:
        found.setdefault(to_hex(bar.get_facecolor()).upper(), []).append(round(bar.get_height(), 2))
    return found


def test_the_figure_shows_losses_readings_and_the_merged_model():
    figure = comparison_figure(made_up_measures.measured(), made_up_measures.merged())
    loss, form, likeness, length, choice = figure.axes
    assert [tick.get_text() for tick in loss.get_xticklabels()] == ["16-bit\nbase", "4-bit\nbase", "tuned", "merged"]
    assert [round(bar.get_height(), 2) for bar in loss.patches] == [3.6, 3.99, 3.18, 3.06]
    assert bars(form)[MERGED] == [0.71, 0.88, 0.0, 1.0] and bars(form)[BASE] == [0.0, 0.33, 0.17, 0.33]
    assert bars(likeness)[BASE] == [0.0, 0.13, 0.0, 0.27], "by itself and forced, beside each other"
    assert bars(length)[BASE] == [198.0, 0.0, 71.0]
    assert said(figure).count("≥") == 1, "thinking that was cut is a lower bound"
    assert bars(choice) == {BASE: [0.0, 0.25, 0.4], TUNED: [0.0, 0.28, 0.38]}
    assert sum(to_hex(line.get_color()) == ACCENT.lower() for line in choice.collections) == 3, "chance, for each reading"
    assert [text.get_text() for text in figure.legends[0].texts] == ["base", "tuned", "merged", "chance"]


def test_the_mark_of_a_bound_is_larger_than_a_number():
    drawn = comparison_figure(made_up_measures.measured())
    sizes = {text.get_text(): text.get_fontsize() for axes in drawn.axes for text in axes.texts}
    assert sizes["≥"] > sizes["3.99"]


def test_an_alt_text_says_what_each_panel_shows():
    assert describe_figure(loss_figure(LOG)) == "Loss during fine-tuning: loss (nats per token) over optimizer step"
    text = describe_figure(comparison_figure(made_up_measures.measured()))
    assert text.startswith("The effects of fine-tuning, on held-out rows and questions. Held-out loss: nats per token. Form, ")
    assert text.endswith(". Multiple choice: share right")
    assert describe_figure(Figure()) == ""


def test_an_earlier_run_has_no_bar_that_it_did_not_measure():
    figure = comparison_figure({"metrics": made_up_measures.measured()["metrics"]})
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["base", "tuned"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["base", "tuned"]
    assert MERGED not in bars(figure.axes[1]) and bars(figure.axes[2])[BASE] == [0.0, 0.0]


def test_the_losses_alone_make_a_figure():
    axes = loss_bars_figure(made_up_measures.measured()).axes[0]
    assert said(axes.figure) == ["3.60", "3.99", "3.18"] and axes.get_ylabel() == "nats per token"


@pytest.mark.parametrize(
    "log", [[], [{"step": 6, "train_loss": 1.5}], [{"step": 1, "loss": math.nan}]], ids=["empty", "end", "nan"]
)
@pytest.mark.filterwarnings("error")
def test_a_log_without_a_loss_makes_figures_that_say_so(log):
    for figure in (loss_figure(log), band_figure({10: (1.0, 2.0)}, log)):
        assert to_data_uri(figure)
    assert said(loss_figure([])) == ["no loss was logged"]


LOG = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.75}, {"step": 2, "loss": 1.5}]


@pytest.mark.parametrize(("before", "expected"), [(None, [(2, 1.75)]), (2.25, [(0, 2.25), (2, 1.75)])])
def test_the_held_out_loss_starts_at_step_0_if_it_is_known(before, expected):
    trained, held_out = loss_figure(LOG, before).axes[0].lines
    assert list(zip(*held_out.get_data(), strict=True)) == expected
    assert list(zip(*trained.get_data(), strict=True)) == [(1, 2.0), (2, 1.5)]


def test_a_figure_for_a_telephone_has_its_panels_in_one_column():
    figure = comparison_figure(made_up_measures.measured(), made_up_measures.merged(), narrow=True)
    figure.draw_without_rendering()
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
    assert all(axes.title.get_window_extent().x1 <= figure.bbox.width for axes in figure.axes), "no title is cut"
    assert loss_figure(LOG, narrow=True).get_figwidth() == figure.get_figwidth() < 5


@pytest.mark.parametrize("figure", [loss_figure(LOG), comparison_figure(made_up_measures.measured())], ids=["loss", "comparison"])
def test_a_figure_brings_its_own_light_ground(figure):
    png = base64.b64decode(to_data_uri(figure).partition(",")[2])
    assert Image.open(io.BytesIO(png)).convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255), "readable in dark mode"
