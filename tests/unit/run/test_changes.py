"""Why something is made again: the setting with its old and new value, the input, or the file."""

from __future__ import annotations

import json

import pytest

from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.lock import RunError
from medcot_utils.run.store import MANIFEST

# Artifacts that are made only if their setting is on.
WANTED = ("export.gguf=f16", "evaluation.base_16bit_loss=true", "evaluation.measure_merged=true")


@pytest.fixture
def done(run_factory, write_all):
    """A finished run, with artifacts that were made up."""
    run = write_all(run_factory(*WANTED))
    for step in STEPS:
        run.record_step(step, state="done")
    return run


@pytest.mark.parametrize(
    ("override", "step", "reasons"),
    [
        ("training.learning_rate=1e-4", "05_training", ["training.learning_rate 0.002 -> 0.0001"]),
        ("generation.max_new_tokens=20", "02_baseline_inference", ["generation.max_new_tokens 24 -> 20"]),
        ("lora.target_modules=[q_proj]", "04_lora_config", None),
        ("export.gguf=q8_0", "07_export", ['export.gguf "f16" -> "q8_0"']),
    ],
)
def test_a_changed_setting_is_named_with_both_values(done, run_factory, override, step, reasons):
    found = run_factory(*WANTED, override).why_stale(step)
    assert found == reasons or (reasons is None and found[0].endswith('"down_proj"] -> ["q_proj"]'))
    assert done.why_stale(step) == []


def test_a_changed_input_is_named(done, content):
    done.write("train_rows", content("train_rows", "second"))
    assert done.why_stale("05_training") == ["train_rows.parquet changed"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("true", "merged_metrics.json is asked for now (evaluation.measure_merged)"),
        ("false", "merged_metrics.json is no longer asked for (evaluation.measure_merged)"),
    ],
)
def test_an_input_asked_for_or_no_longer_names_its_setting(run_factory, write_all, wanted, reason):
    write_all(run_factory(f"evaluation.measure_merged={'false' if wanted == 'true' else 'true'}"))
    found = run_factory(f"evaluation.measure_merged={wanted}").why_stale("07_export")
    assert reason in found and not [line for line in found if line.endswith(" changed")]


def test_a_changed_file_of_ones_own_is_named(run_factory, write_all, tmp_path):
    (tmp_path / "own.jsonl").write_text("{}")
    run = write_all(run_factory(f"evaluation.mcq_tasks=[{tmp_path}/own.jsonl]"))
    (tmp_path / "own.jsonl").write_text("[]")
    assert run.why_stale("02_baseline_inference") == [f"questions of {tmp_path}/own.jsonl changed"]


def test_a_missing_file_is_named(done):
    (done.path / "report.html").unlink()
    assert done.why_stale("06_comparison") == ["report.html is missing, or differs from its record"]


def test_an_early_record_says_that_settings_changed(done, run_factory):
    manifest = json.loads((done.path / MANIFEST).read_text())
    for entry in manifest["artifacts"].values():
        del entry["settings"]
    (done.path / MANIFEST).write_text(json.dumps(manifest))
    assert run_factory(*WANTED, "lora.r=8").why_stale("04_lora_config") == ["settings changed"]


def test_a_step_refused_for_its_input_says_what_changed(done, run_factory):
    with pytest.raises(RunError, match=r"than the run has now \(dataset\.loss_on \"completion\" -> \"full\"\): run notebook 02"):
        run_factory(*WANTED, "dataset.loss_on=full").begin("05_training")


@pytest.mark.parametrize("override", ["dataset.path=/other.jsonl", "dataset.name=a/b", "model.revision=abc"])
def test_other_data_or_model_is_refused_without_force(done, run_factory, override):
    before = (done.path / "config.json").read_bytes()
    name, _, value = override.partition("=")
    with pytest.raises(RunError, match=rf"holds a run of {name} .*, not '{value}': choose another .* or redo it .* with --force"):
        run_factory(override, "evaluation.num_questions=3")
    assert (done.path / "config.json").read_bytes() == before
    assert run_factory(override, force=True).config.get(name) == value


def test_other_data_is_taken_while_nothing_is_made_of_it(run_factory):
    run_factory().write("machine", {})
    assert run_factory("dataset.path=/other.jsonl").config.dataset.path == "/other.jsonl"
