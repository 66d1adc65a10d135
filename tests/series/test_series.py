"""The seven notebooks through `medcot run` on profile smoke: done once, skipped when done, and what one alone says.

tests/sessions/test_redone.py has what redoes several of them."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from commands import manifest, medcot, notebook_times, redone, states, succeed

from medcot_utils.evaluation.headline import HEADLINE
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series.runner import notebooks_dir

pytestmark = pytest.mark.series


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


def test_status_gives_seven_headline_metrics_with_their_intervals(first_call):
    found = json.loads(succeed("status", first_call[0], "--json").stdout)
    assert found["profile"] == "smoke"
    assert set(found["metrics"]) == set(HEADLINE) and len(HEADLINE) == 7
    for name, metric in found["metrics"].items():
        counts = {"n", "both", "only_base", "only_tuned", "neither"} if name.startswith("mcq_") else set()
        assert set(metric) - {"cut"} == {"base", "tuned", "difference"} | counts
        for label in ("base", "tuned", "difference"):
            side = metric[label]
            tested = {"needed"} | ({"p", "alpha", "changed"} if METRICS[name].yes_or_no else {"spread"})
            assert set(side) == {"value", "low", "high", "n"} | (tested if label == "difference" else set())
            assert side["low"] <= side["value"] <= side["high"]
            assert side["n"] == (4 if counts else 40 if name == "eval_loss" else 6)
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
    assert "03_dataset_prep cannot begin" in result.stderr and "run notebook 02_baseline_inference first" in result.stderr


def test_a_second_run_in_the_same_directory_is_refused(done):
    from filelock import FileLock

    with FileLock(done / ".lock"):
        result = medcot("run", "--run-dir", done)
    assert result.returncode == 1 and "another medcot run is working in" in result.stderr
