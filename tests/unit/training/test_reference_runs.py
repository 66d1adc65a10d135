"""The public T4 runs: whose losses may be compared with theirs, the band they make, and what is placed in it."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config, setting_names
from medcot_utils.training.reference_runs import compare_with_reference, read_reference, reference_band, reference_differences

ARTICLE = load_config("article")
FOUR_RUNS = [1.9189, 1.4615, 1.4023, 1.3088, 1.3443, 1.3140]
STEPS = [10, 20, 30, 40, 50, 60]


def log(losses, steps=STEPS):
    return [{"step": step, "loss": loss} for step, loss in zip(steps, losses, strict=True)]


# --- who may be compared -------------------------------------------------------------------------------------------


def test_the_article_profile_meets_every_condition():
    assert reference_differences(ARTICLE) == {}


def test_every_condition_is_a_setting_or_the_effective_batch():
    names = set(read_reference()["conditions"])
    assert names - set(setting_names()) == {"effective_batch_size"}


@pytest.mark.parametrize(
    ("override", "name", "theirs", "ours"),
    [
        ("training.learning_rate=1e-4", "training.learning_rate", 2e-4, 1e-4),
        ("dataset.num_rows=2000", "dataset.num_rows", 500, 2000),
        ("dataset.loss_on=completion", "dataset.loss_on", "full", "completion"),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", list(ARTICLE.lora.target_modules), ["q_proj", "v_proj"]),
        ("seed=1", "seed", 3407, 1),
        ("training.gradient_accumulation_steps=2", "effective_batch_size", 8, 4),
    ],
)
def test_one_changed_setting_is_named_alone_with_both_values(override, name, theirs, ours):
    assert reference_differences(load_config("article", [override])) == {name: (theirs, ours)}


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"],
        ["training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1"],
        ["training.num_processes=2"],
        ["training.batch_plan=as_set", "training.padding=padded", "training.max_hours=2"],
        ["lora.use_gradient_checkpointing=false", "training.save_steps=5", "training.eval_steps=null"],
        ["generation.max_new_tokens=10", "evaluation.num_questions=5"],
    ],
)
def test_how_the_same_steps_are_taken_forbids_no_comparison(overrides):
    assert reference_differences(load_config("article", overrides)) == {}


@pytest.mark.parametrize("profile", ["demo", "smoke", "recommended", "full"])
def test_another_profile_is_not_ranked_but_compared(profile):
    table = compare_with_reference(load_config(profile), log(FOUR_RUNS))
    assert list(table.columns) == ["public T4 runs", "this run"]
    assert set(table.index) == set(reference_differences(load_config(profile))) != set()


def test_the_demos_table_names_its_model():
    table = compare_with_reference(load_config("demo"), [])
    assert table.loc["model.name", "public T4 runs"] == "unsloth/DeepSeek-R1-Distill-Llama-8B"
    assert table.loc["model.name", "this run"] == "embedded:smollm2-135m-instruct"
    assert table.loc["dataset.num_rows"].tolist() == ["500", "null"], "as a user types them"


# --- the band ------------------------------------------------------------------------------------------------------


def test_the_curve_of_four_runs_stands_in_the_file():
    (four,) = [run for run in read_reference()["runs"] if run["count"] == 4]
    assert four["losses"] == FOUR_RUNS and read_reference()["steps"] == STEPS


def test_the_band_holds_all_its_runs_with_room_on_both_sides():
    bounds = reference_band()
    assert list(bounds) == STEPS
    for run in read_reference()["runs"]:
        for loss, (low, high) in zip(run["losses"], bounds.values(), strict=True):
            assert low + 0.05 <= loss <= high - 0.05
    widths = [high - low for low, high in bounds.values()]
    assert all(0.1 <= width < 0.2 for width in widths), "a band that holds everything would say nothing"


def test_the_bands_bounds_by_hand():
    # Step 60: 1.3140 and 1.3212 lie 0.0072 apart; twice that is less than 0.05.
    assert reference_band()[60] == pytest.approx((1.3140 - 0.05, 1.3212 + 0.05))


def test_the_runs_on_another_gpu_and_batch_are_not_all_inside():
    outside = [
        loss
        for run in read_reference()["other_runs"]
        for loss, (low, high) in zip(run["losses"], reference_band().values(), strict=True)
        if not low <= loss <= high
    ]
    assert outside, "the band tells another recipe from this one"


# --- placing -------------------------------------------------------------------------------------------------------


def test_the_public_curve_itself_is_inside_at_every_step():
    table = compare_with_reference(ARTICLE, log(FOUR_RUNS))
    assert list(table.index) == STEPS and list(table["this run"]) == FOUR_RUNS
    assert list(table["inside"]) == [True] * 6


def test_losses_outside_are_marked_on_either_side():
    losses = [*FOUR_RUNS]
    losses[1], losses[4] = 1.30, 1.60
    table = compare_with_reference(ARTICLE, log(losses))
    assert list(table["inside"]) == [True, False, True, True, False, True]
    assert table.loc[20, "this run"] < table.loc[20, "band low"] and table.loc[50, "this run"] > table.loc[50, "band high"]


def test_only_steps_of_the_band_that_were_logged_are_placed():
    history = [
        *log([2.5, 1.9], [5, 10]),
        {"step": 20, "eval_loss": 1.4},
        {"step": 30, "loss": "1.4023"},  # as a trainer's state may hold it
        {"step": 30, "skipped_step": 1},
        {"step": 70, "loss": 1.2},
    ]
    table = compare_with_reference(ARTICLE, history)
    assert list(table.index) == [10, 30] and list(table["inside"]) == [True, True]
