"""The seven notebooks through `medcot run` on profile smoke: done once, skipped when done, redone when stale, the same again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series.runner import HEADLINE, notebooks_dir

pytestmark = pytest.mark.series

MEDCOT = Path(sys.executable).with_name("medcot")


def medcot(*arguments):
    # On the CPU and with one thread: the same bits everywhere, and no threads that wait for each other on a busy machine.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [str(MEDCOT), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=1200, check=False
    )


def succeed(*arguments):
    result = medcot(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def notebook_times(run_dir):
    return {path.stem: path.stat().st_mtime_ns for path in (run_dir / "notebooks").glob("*.ipynb")}


def redone(before, run_dir):
    """The notebooks whose executed copy was written anew since `before`."""
    return sorted(name for name, time in notebook_times(run_dir).items() if before.get(name) != time)


def states(run_dir):
    return {step["name"]: step["state"] for step in json.loads(succeed("status", run_dir, "--json").stdout)["steps"]}


def manifest(run_dir):
    return json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def first_call(smoke_series):
    """(run directory, result) of the whole series on smoke."""
    said = [(smoke_series / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return smoke_series / "run", subprocess.CompletedProcess([], 0, *said)


@pytest.fixture
def done(first_call, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(first_call[0], tmp_path / "run")


# --- one whole run -------------------------------------------------------------------------------------------------


def test_all_seven_are_done_and_every_artifact_is_there(first_call):
    run_dir, result = first_call
    assert result.stderr == ""
    assert states(run_dir) == dict.fromkeys(STEPS, "done")
    made = {name: artifact for name, artifact in ARTIFACTS.items() if Run.open(run_dir).wants(name)}
    assert ARTIFACTS.keys() - made.keys() == {"gguf", "gguf_check"}, "what smoke does not ask for"
    assert set(manifest(run_dir)["artifacts"]) == set(made)
    assert all((run_dir / artifact.file).exists() for artifact in made.values())
    hidden = [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"], "nothing half written is left"
    assert all(f"{name}: " in result.stdout for name in STEPS)


def test_status_gives_six_headline_metrics_with_their_intervals(first_call):
    found = json.loads(succeed("status", first_call[0], "--json").stdout)
    assert found["profile"] == "smoke"
    assert set(found["metrics"]) == set(HEADLINE) and len(HEADLINE) == 6
    for name, metric in found["metrics"].items():
        assert set(metric) - {"cut"} == {"base", "tuned", "difference"}
        for label in ("base", "tuned", "difference"):
            side = metric[label]
            tested = {"needed"} | ({"p", "alpha", "changed"} if METRICS[name].yes_or_no else {"spread"})
            assert set(side) == {"value", "low", "high", "n"} | (tested if label == "difference" else set())
            assert side["low"] <= side["value"] <= side["high"]
            assert side["n"] == (40 if name == "eval_loss" else 6)
    loss = found["metrics"]["eval_loss"]
    assert loss["difference"]["value"] == pytest.approx(loss["tuned"]["value"] - loss["base"]["value"])
    assert loss["difference"]["high"] < 0, "six steps lower the loss of the tiny model on every resample"
    assert all(step["seconds"] >= 0 and step["peak_memory_mb"] > 50 for step in found["steps"])


def test_the_executed_notebooks_hold_outputs_and_no_error(first_call):
    for name in STEPS:
        notebook = json.loads((first_call[0] / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        assert outputs and not any(output["output_type"] == "error" for output in outputs)


def test_a_second_call_does_nothing_again(done):
    before, recorded = notebook_times(done), manifest(done)
    result = succeed("run", "--profile", "smoke", "--run-dir", done)
    assert result.stdout.count("done before") == 7
    assert redone(before, done) == [] and manifest(done) == recorded


# --- what is redone, and what is not -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_other_answers(first_call, tmp_path_factory):
    """(run directory, notebook times and adapter time before, the refused call, times after it) of a copy whose answers got
    another length: first asked of notebook 06 alone, then of the whole series."""
    run_dir = shutil.copytree(first_call[0], tmp_path_factory.mktemp("answers") / "run")
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


def test_force_redoes_what_it_is_asked_for_and_nothing_else(done):
    before = notebook_times(done)
    succeed("run", "--profile", "smoke", "--run-dir", done, "--force", "--from", "4", "--to", "4")
    assert redone(before, done) == ["04_lora_config"]


def test_a_setting_reaches_the_notebooks_and_stays(tmp_path):
    changed = (
        "--set",
        "training.max_steps=3",
        "--set",
        "dataset.near_repeat_similarity=90.5",
        "--set",
        "lora.target_modules=[q_proj]",
    )
    succeed("run", "--profile", "smoke", "--run-dir", tmp_path / "run", "--to", "1", *changed)
    # Notebook 01 resolves the configuration again and writes it: what it was not given would be lost here.
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["training"]["max_steps"], config["dataset"]["near_repeat_similarity"]) == (3, 90.5)
    assert config["lora"]["target_modules"] == ["q_proj"]


def alter_one_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_notebooks_refuse_an_altered_adapter_the_series_redoes(done):
    weights = done / "adapter" / "adapter_model.safetensors"
    original = weights.read_bytes()
    alter_one_byte(weights)

    refused = medcot("run", "--run-dir", done, "--from", "6", "--to", "6", "--force")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("medcot: notebook 06_comparison failed")
    assert "adapter in run/ is altered" in refused.stderr and "run notebook 05_training again" in refused.stderr
    assert states(done)["06_comparison"] == "failed"

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


# --- the same again ------------------------------------------------------------------------------------------------


def test_the_same_seeds_give_the_same_adapter_bit_for_bit(first_call, tmp_path):
    weights = Path("adapter") / "adapter_model.safetensors"
    again = tmp_path / "again"
    succeed("run", "--profile", "smoke", "--run-dir", again, "--to", "5")
    content = (again / weights).read_bytes()
    assert content == (first_call[0] / weights).read_bytes()
    before = notebook_times(again)
    succeed("run", "--run-dir", again, "--to", "5", "--set", "lora.random_state=1")
    assert redone(before, again) == ["01_setup", "04_lora_config", "05_training"]
    assert (again / weights).read_bytes() != content


# --- one notebook alone --------------------------------------------------------------------------------------------


def test_a_notebook_in_a_fresh_folder_names_the_one_to_run_first(tmp_path):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source = notebooks_dir() / "03_dataset_prep.ipynb"
    with pytest.raises(PapermillExecutionError, match="run notebook 01_setup first"):
        papermill.execute_notebook(
            str(source), str(tmp_path / "out.ipynb"), parameters={"RUN_DIR": str(tmp_path / "run")}, progress_bar=False
        )
    assert not (tmp_path / "run").exists()


def test_a_notebook_before_the_one_it_reads_from_names_that_one(tmp_path):
    result = medcot("run", "--profile", "smoke", "--run-dir", tmp_path / "run", "--from", "3", "--to", "3")
    assert result.returncode == 1
    assert "03_dataset_prep failed" in result.stderr and "run notebook 02_baseline_inference first" in result.stderr


def test_inputs_of_other_settings_name_the_notebook_to_rerun(with_other_answers):
    done, before, _, refused, between = with_other_answers
    assert refused.returncode == 1
    assert "base_answers.jsonl in run/ was made with other settings" in refused.stderr
    assert "run notebook 02_baseline_inference again" in refused.stderr
    tried = sorted(name for name, time in between.items() if before.get(name) != time)
    assert tried == ["06_comparison"], "tried, and stopped before any model"
    assert states(done)["06_comparison"] == "done", "the whole series then does what was missing"


def test_a_second_run_in_the_same_directory_is_refused(done):
    from filelock import FileLock

    with FileLock(done / ".lock"):
        result = medcot("run", "--run-dir", done)
    assert result.returncode == 1 and "another medcot run is working in" in result.stderr


def test_a_parameter_reaches_the_notebook_that_declares_it(done):
    before = notebook_times(done)
    succeed("run", "--run-dir", done, "--from", "2", "--to", "3", "--parameter", "QUESTION=Is a fever of 41.5 = danger?")
    assert redone(before, done) == ["02_baseline_inference"], "03 has no such parameter"
    executed = (done / "notebooks" / "02_baseline_inference.ipynb").read_text(encoding="utf-8")
    assert executed.count("Is a fever of 41.5 = danger?") >= 2, "once as parameter, once in the printed prompt"
