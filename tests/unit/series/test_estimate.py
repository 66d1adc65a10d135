"""How long a series takes: what lengthens which notebook, known runs within the stated band, and what is said of sessions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from medcot_utils.config import load_config
from medcot_utils.machine.paths import PACKAGE
from medcot_utils.machine.probe import KAGGLE_T4S, MachineSpeed
from medcot_utils.run.artifacts import STEPS
from medcot_utils.series import estimate
from medcot_utils.series.estimate import SeriesEstimate, describe_sessions, estimate_series, estimate_table

CPU = MachineSpeed("2 CPU cores", 0, 0.0, 130e9, 18e9, 1.0, 289e3)  # AVX2, measured
ONE_T4 = replace(KAGGLE_T4S, where="Tesla T4", gpus=1)
LARGE = MachineSpeed("NVIDIA H100", 1, 79, 710e12, 2.6e12, 10e9, 500e3)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("medcot_utils.machine.disk._hub_cache", lambda: tmp_path / "hub")


def seconds(profile, speed, *overrides):
    found = estimate_series(load_config(profile, overrides), None, speed)
    return {step: one["seconds"] for step, one in found.steps.items()}


# --- what takes time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "longer"),
    [
        ("training.max_steps=90", {"05_training"}),
        ("training.eval_steps=5", {"05_training"}),
        ("generation.max_new_tokens=3000", {"02_baseline_inference"}),  # a tuned model answers as long as its rows
        ("evaluation.n_samples=4", {"02_baseline_inference", "06_comparison"}),
        ("evaluation.mcq_max_new_tokens=3000", {"02_baseline_inference", "06_comparison"}),
        ("evaluation.n_resamples=50000", {"06_comparison"}),
        ("export.check_new_tokens=500", {"07_export"}),
    ],
)
@pytest.mark.parametrize("speed", [KAGGLE_T4S, LARGE], ids=["T4", "large"])
def test_a_setting_lengthens_the_notebooks_it_is_of(override, longer, speed):
    before, after = seconds("article", speed), seconds("article", speed, override)
    assert {step for step in STEPS if after[step] > before[step]} == longer
    assert {step for step in STEPS if after[step] < before[step]} == set()


@pytest.mark.parametrize(
    ("change", "longer"),
    [
        ({"product": 10e9}, "05_training"),
        ({"memory": 1e9}, "02_baseline_inference"),
        ({"small_steps": 30e3}, "01_setup"),
    ],
)
def test_a_slower_machine_takes_longer(change, longer):
    assert seconds("demo", replace(CPU, **change))[longer] > 1.5 * seconds("demo", CPU)[longer]


def test_what_must_be_downloaded_first_counts():
    copies = {"model.quantized_name=null", "evaluation.base_16bit_loss=false"}
    before, after = seconds("article", LARGE), seconds("article", LARGE, *copies)
    assert after["02_baseline_inference"] > before["02_baseline_inference"] + 60, "16 GB instead of 6"
    assert after["06_comparison"] < before["06_comparison"] - 60, "which are there then"


def test_every_row_is_counted_for_an_epoch():
    assert seconds("full", ONE_T4)["05_training"] > 8 * seconds("recommended", ONE_T4)["05_training"]


def test_more_rows_than_the_fused_product_serves_cost_more():
    def steps_at(rows):
        by_unsloth = seconds("article", ONE_T4, f"generation.batch_size={rows}", "model.engine=unsloth")
        return by_unsloth["02_baseline_inference"]

    assert steps_at(17) > 1.3 * steps_at(16)


def test_a_merged_model_that_no_gpu_holds_is_asked_nothing():
    alone, together = seconds("article", ONE_T4), seconds("article", KAGGLE_T4S)
    unasked = seconds("article", KAGGLE_T4S, "evaluation.merged_questions=0")
    assert together["07_export"] > unasked["07_export"]
    assert alone["07_export"] == seconds("article", ONE_T4, "evaluation.measure_merged=true")["07_export"]


def test_a_model_nobody_knows_has_no_estimate(monkeypatch):
    monkeypatch.setattr("medcot_utils.machine.disk._folder_or_hub_bytes", lambda *asked: None)
    assert estimate_series(load_config("article", ["model.name=me/unknown"]), None, KAGGLE_T4S) is None


# --- known runs ----------------------------------------------------------------------------------------------------


def test_the_articles_training_on_a_t4_lasts_as_in_public_runs(monkeypatch):
    runs = json.loads((PACKAGE / "data" / "t4_reference.json").read_text(encoding="utf-8"))["runs"]
    published = [second for run in runs for second in run["train_seconds"]]
    settings = ["training.eval_steps=null", "dataset.held_out_rows=1", "evaluation.num_questions=1"]
    some, more = (seconds("article", ONE_T4, *settings, f"training.max_steps={steps}")["05_training"] for steps in (60, 120))
    assert min(published) <= more - some <= max(published)


# The demo on those two cores, on November 26, 2026, with a fresh cache.
DEMO = {
    "01_setup": 28.0,
    "02_baseline_inference": 281.6,
    "03_dataset_prep": 13.3,
    "04_lora_config": 18.3,
    "05_training": 392.4,
    "06_comparison": 165.1,
    "07_export": 143.0,
}


def test_the_demo_takes_what_it_took_within_a_third(monkeypatch):
    monkeypatch.setattr("medcot_utils.series.estimate.is_made", lambda name: False)
    found = seconds("demo", CPU)
    off = {step: round(found[step] / took, 2) for step, took in DEMO.items()}
    assert {step: ratio for step, ratio in off.items() if not 1 / 1.35 < ratio < 1.35} == {}


def test_the_first_demo_on_a_machine_makes_its_model(monkeypatch):
    def estimate(is_made, was_made_here):
        monkeypatch.setattr("medcot_utils.series.estimate.is_made", lambda name: is_made)
        monkeypatch.setattr("medcot_utils.series.estimate.was_made_here", lambda name: was_made_here)
        return seconds("demo", CPU)

    first, again = estimate(False, False), estimate(True, False)
    assert [step for step in first if first[step] > again[step]] == ["01_setup"]
    assert estimate(True, True) == first, "notebook 01 estimates after it made the model"


def test_small_takes_well_under_an_hour_on_kaggle():
    total = estimate_series(load_config("small"), None, KAGGLE_T4S).total
    assert total["high"] < 3600


# --- what is said --------------------------------------------------------------------------------------------------


def made_of(hours, speed=KAGGLE_T4S, step="05_training"):
    none = {"seconds": 0.0, "low": 0.0, "high": 0.0}
    long = {"seconds": hours * 3600, "low": hours * 2400, "high": hours * 5400}
    return SeriesEstimate(dict.fromkeys(STEPS, none) | {step: long}, speed)


@pytest.mark.parametrize(
    ("hours", "settings", "said"),
    [
        (2, [], "2.0 h (1.3 to 3.0), an estimate from published rates; a session has 12 h, a week 30 h of GPU time: one session"),
        (
            10,
            [],
            ": one session may not be enough. Set training.max_hours=10, and the series pauses in time, and a next session",
        ),
        (15, [], ": about 2 sessions. Set training.max_hours=10"),
        (15, ["training.max_hours=10"], ": about 2 sessions. The series pauses in time, and a next session resumes"),
        (9, ["training.max_hours=3"], ": about 3 sessions."),
        (40, [], ": about 4 sessions, and more than a week's 30 h."),
    ],
)
def test_a_series_longer_than_a_session_says_what_to_set(hours, settings, said):
    assert said in describe_sessions(made_of(hours), load_config("article", settings), on_kaggle=True)


def test_long_answers_are_to_be_made_fewer():
    line = describe_sessions(made_of(15, step="06_comparison"), load_config("article"), on_kaggle=True)
    assert line.endswith(
        "06_comparison takes longest: lower evaluation.num_questions, evaluation.n_samples or evaluation.mcq_limit"
    )


@pytest.mark.parametrize("speed", [KAGGLE_T4S, CPU])
def test_sessions_are_said_on_kaggle_with_a_gpu_only(speed, monkeypatch):
    assert "session" not in describe_sessions(made_of(40, speed), load_config("article"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert ("session" in describe_sessions(made_of(40, speed), load_config("article"))) is (speed.gpus > 0)


@pytest.mark.parametrize(("measured", "band"), [(True, estimate._MEASURED_BAND), (False, estimate._PUBLISHED_BAND)])
def test_the_band_is_wider_if_nothing_was_measured(measured, band):
    total = estimate_series(load_config("article"), None, replace(ONE_T4, measured=measured)).total
    assert total["high"] / total["seconds"] == pytest.approx(band, rel=0.01)
    assert total["seconds"] / total["low"] == pytest.approx(band, rel=0.01)


def test_the_table_has_each_notebook_and_all_of_them():
    table = estimate_table(made_of(2))
    assert list(table.index) == [*STEPS, "all seven"] and list(table.columns) == ["time on 2 x Tesla T4"]
    assert table.iloc[-1, 0] == "2.0 h (1.3 to 3.0)"
