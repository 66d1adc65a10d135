"""The steps of a run: their states, times, and costs, and what is redone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.lock import RunError
from medcot_utils.run.manifest import describe_costs
from medcot_utils.run.store import MANIFEST


def peak_bytes():
    """The most memory that this process has held, as the system's own file has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_a_step_goes_from_not_run_over_running_to_done(run_factory):
    run = run_factory()
    states = [run.step_state("01_setup")]
    run.begin("01_setup")
    states.append(run.step_state("01_setup"))
    run.write("machine", {})
    entry = run.record_done("01_setup")
    assert [*states, run.step_state("01_setup")] == ["not run", "running", "done"]
    assert entry["seconds"] >= 0 and entry["peak_memory_mb"] == pytest.approx(peak_bytes() / 1e6, rel=0.01)
    assert "peak_gpu_memory_mb" in entry


def test_costs_name_the_gpu_only_where_there_was_one():
    entry = {"seconds": 93.0, "peak_memory_mb": 16808}
    assert describe_costs(entry) == "93.0 s, peak memory 16808 MB"
    assert describe_costs(entry | {"peak_gpu_memory_mb": None}) == "93.0 s, peak memory 16808 MB"
    on_a_gpu = entry | {"peak_gpu_memory_mb": {"allocated": 7700, "reserved": 8812}}
    assert describe_costs(on_a_gpu) == "93.0 s, peak memory 16808 MB, 8812 MB of the GPU"


ESTIMATE = {"seconds": 240.0, "low": 180.0, "high": 330.0}


def test_an_estimate_stands_beside_the_time_it_took(run_factory, capsys):
    run = run_factory()
    run.write("machine", {"estimate": {"02_baseline_inference": ESTIMATE, "04_lora_config": {"seconds": "long"}}})
    run.begin("02_baseline_inference")
    said = capsys.readouterr()
    assert said.out.startswith("02_baseline_inference: 4 min (3 to 6), until about ") and said.err == "", (
        "no red ground in a notebook"
    )
    entry = run.record_done("02_baseline_inference")
    assert entry["estimate"] == run.manifest()["steps"]["02_baseline_inference"]["estimate"] == ESTIMATE
    assert ", estimated 4 min (3 to 6), peak memory" in describe_costs(entry)
    assert run.estimate("03_dataset_prep") is run.estimate("04_lora_config") is None


@pytest.mark.parametrize("machine", [None, "", "[]", "{}", '{"estimate": null}', '{"estimate": {"02_baseline_inference": null}}'])
def test_a_run_without_an_estimate_begins_in_silence(run_factory, capsys, machine):
    run = run_factory()
    if machine is not None:
        (run.path / "machine.json").write_text(machine)
    run.begin("02_baseline_inference")
    assert run.estimate("02_baseline_inference") is None and capsys.readouterr() == ("", "")
    assert describe_costs(run.record_done("02_baseline_inference")).count(",") == 1


def test_a_step_whose_process_is_gone_is_interrupted(run_factory):
    run = run_factory()
    run.begin("01_setup")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    run.record_step("01_setup", pid=ended.pid)
    assert run.step_state("01_setup") == "interrupted"
    run.begin("01_setup")
    assert (run.step_state("01_setup"), run.manifest()["steps"]["01_setup"]["pid"]) == ("running", os.getpid())


def test_a_failed_step_stays_failed_until_it_begins_again(run_factory, write_all):
    run = write_all(run_factory())
    run.record_step("02_baseline_inference", state="failed", error="ValueError: x")
    assert run.step_state("02_baseline_inference") == "failed"
    run.begin("02_baseline_inference")
    assert run.manifest()["steps"]["02_baseline_inference"]["error"] is None


def test_changed_settings_or_a_lost_artifact_make_a_step_stale(run_factory, write_all):
    run = write_all(run_factory())
    for step in STEPS:
        run.record_step(step, state="done")
    changed = run_factory("lora.r=8")
    states = {step: changed.step_state(step) for step in STEPS}
    assert {step for step, state in states.items() if state == "stale"} == {"01_setup", "04_lora_config", "05_training"}
    run.require("report").unlink()
    assert run_factory().step_state("06_comparison", deep=False) == "stale"


def test_forgetting_a_step_removes_its_record_and_checkpoints(run_factory, write_all):
    run = write_all(run_factory())
    run.record_step("05_training", state="done")
    (run.checkpoint_dir("adapter") / "checkpoint-2").mkdir()
    run.forget("05_training")
    assert run.step_state("05_training") == "not run"
    assert not any(map(run.is_fresh, ("adapter", "training_log", "held_out_loss"))) and run.is_fresh("plan")
    assert not (run.path / "checkpoints").exists()
    assert json.loads((run.path / MANIFEST).read_text())["steps"] == {}


def test_the_next_step_removes_half_written_files_after_a_kill(run_factory, write_all):
    run = write_all(run_factory())
    gone, alive = run.path / ".merged.4194305.tmp", run.path / f".merged.{os.getpid()}.tmp"  # above Linux's largest PID
    for folder in (gone, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    run.begin("05_training")
    assert not gone.exists() and alive.exists()


def test_inputs_of_other_settings_are_refused_with_the_notebook(run_factory, write_all):
    write_all(run_factory())
    changed = run_factory("dataset.loss_on=full")
    with pytest.raises(RunError, match=r"made with other settings .* run notebook 02_baseline_inference again"):
        changed.begin("05_training")
    run_factory().begin("05_training")
