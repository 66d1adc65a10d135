"""What `medcot run` redoes of a finished series when something changed, and what it leaves; the same seeds, the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import medcot, notebook_times, redone, states, succeed

from medcot_utils.run.artifacts import STEPS


@pytest.fixture
def done(smoke_series, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(smoke_series / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def with_other_answers(smoke_series, tmp_path_factory):
    """(run directory, notebook times and adapter time before, the refused call, times after it) of a copy whose answers got
    another length: first asked of notebook 06 alone, then of the whole series."""
    run_dir = shutil.copytree(smoke_series / "run", tmp_path_factory.mktemp("answers") / "run")
    before, adapter = notebook_times(run_dir), (run_dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    changed = ("--set", "generation.max_new_tokens=20")
    refused = medcot("run", "--run-dir", run_dir, "--from", "6", "--to", "6", *changed)
    between = notebook_times(run_dir)
    # No profile: the run's own settings are kept under the changed one.
    succeed("run", "--run-dir", run_dir, *changed)
    return run_dir, before, adapter, refused, between


def test_other_answers_are_not_another_training(with_other_answers):
    done, before, adapter, _, between = with_other_answers
    assert redone(between, done) == ["01_setup", "02_baseline_inference", "06_comparison", "07_export"]
    assert not {"03_dataset_prep", "04_lora_config", "05_training"} & set(redone(before, done))
    assert (done / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    answers = [json.loads(line) for line in (done / "tuned_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["completion_tokens"] for record in answers} == {20}
    assert json.loads((done / "config.json").read_text())["generation"]["max_new_tokens"] == 20
    assert states(done) == dict.fromkeys(STEPS, "done")


def alter_one_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_altered_adapter_is_refused_and_the_series_redoes_it(done):
    weights = done / "adapter" / "adapter_model.safetensors"
    original = weights.read_bytes()
    alter_one_byte(weights)

    refused = medcot("run", "--run-dir", done, "--from", "6", "--to", "6", "--force")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("medcot: notebook 06_comparison cannot begin")
    assert "adapter in run/ is altered" in refused.stderr and "run notebook 05_training again" in refused.stderr
    assert states(done) == dict.fromkeys(STEPS, "done"), "what was made stands; status looks at sizes alone"

    before = notebook_times(done)
    succeed("run", "--run-dir", done)
    assert {"05_training", "06_comparison"} <= set(redone(before, done))
    assert not {"01_setup", "02_baseline_inference", "03_dataset_prep", "04_lora_config"} & set(redone(before, done))
    assert weights.read_bytes() == original
    assert states(done) == dict.fromkeys(STEPS, "done")


def test_a_missing_artifact_is_made_again(done):
    (done / "report.html").unlink()
    assert states(done)["06_comparison"] == "stale"
    before = notebook_times(done)
    succeed("run", "--run-dir", done, "--to", "6")
    assert redone(before, done) == ["06_comparison"]
    assert (done / "report.html").exists()


def test_inputs_of_other_settings_name_the_notebook_to_rerun(with_other_answers):
    done, before, _, refused, between = with_other_answers
    assert refused.returncode == 1
    assert "base_answers.jsonl in run/ was made with other settings" in refused.stderr
    assert "run notebook 02_baseline_inference again" in refused.stderr
    assert between == before, "stopped before any kernel"
    assert states(done)["06_comparison"] == "done", "the whole series then does what was missing"


def test_a_parameter_reaches_the_notebook_that_declares_it(done):
    before = notebook_times(done)
    succeed("run", "--run-dir", done, "--from", "2", "--to", "3", "--parameter", "QUESTION=Is a fever of 41.5 = danger?")
    assert redone(before, done) == ["02_baseline_inference"], "03 has no such parameter"
    executed = (done / "notebooks" / "02_baseline_inference.ipynb").read_text(encoding="utf-8")
    assert executed.count("Is a fever of 41.5 = danger?") >= 2, "once as parameter, once in the printed prompt"


def test_the_same_seeds_give_the_same_adapter_bit_for_bit(smoke_series, tmp_path):
    weights = Path("adapter") / "adapter_model.safetensors"
    again = tmp_path / "again"
    succeed("run", "--profile", "smoke", "--run-dir", again, "--to", "5")
    content = (again / weights).read_bytes()
    assert content == (smoke_series / "run" / weights).read_bytes()
    before = notebook_times(again)
    succeed("run", "--run-dir", again, "--to", "5", "--set", "lora.random_state=1")
    assert redone(before, again) == ["01_setup", "04_lora_config", "05_training"]
    assert (again / weights).read_bytes() != content
