"""Training in two processes on the CPU, through notebook 05: one process's losses, and what ends it early ends all of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from medcot_utils.config import load_config
from medcot_utils.run.directory import Run
from medcot_utils.training.launch import train_in_processes
from medcot_utils.training.trainer import TrainingError, checkpoint_fault

MEDCOT = Path(sys.executable).with_name("medcot")
SETTINGS = ["training.max_steps=20", "training.save_steps=5", "training.eval_steps=10"]
# What notebook 05 calls, without the rest of it, in a process that can be killed.
TRAIN = """
import sys
from medcot_utils.training.launch import train_in_processes
from medcot_utils.run.directory import Run
train_in_processes(Run.open(sys.argv[1]), 2)
"""


def start(*command):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def medcot(*arguments):
    """(exit code, stdout, stderr) of a `medcot` command."""
    process = start(MEDCOT, *arguments)
    output, errors = process.communicate(timeout=1200)
    return process.returncode, output, errors


def succeed(*arguments):
    code, output, errors = medcot(*arguments)
    assert code == 0, output + errors
    return output


def sets(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def changed(run_dir, *settings):
    """The run with other settings, as if its notebooks had been run with them."""
    Run.create(run_dir, load_config("smoke", settings))
    return run_dir


def newest_checkpoint(run_dir):
    return max(run_dir.glob("checkpoints/*/checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def logged(run_dir):
    """{(kind of loss, step): loss} of the newest checkpoint."""
    history = json.loads((newest_checkpoint(run_dir) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {(key, entry["step"]): entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry}


def training_state(run_dir):
    steps = json.loads(succeed("status", run_dir, "--json"))["steps"]
    return next(step for step in steps if step["name"] == "05_training")


def outputs_of_the_launch(run_dir):
    notebook = json.loads((run_dir / "notebooks" / "05_training.ipynb").read_text(encoding="utf-8"))
    (cell,) = [cell for cell in notebook["cells"] if "train_in_processes" in "".join(cell["source"])]
    return cell["outputs"]


def workers(run_dir):
    """{rank: process} of the training processes of a run that are there now; torchrun's own has rank None."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "medcot_utils.training.worker" in words and str(run_dir) in words:
                found[process.environ().get("RANK")] = process
    return found


def wait_for_steps(run_dir, process, steps=4):
    """Until both processes have taken so many steps of training."""
    deadline = time.monotonic() + 600
    while True:
        lines = [line for file in run_dir.glob("checkpoints/*/progress.jsonl") for line in file.read_text().splitlines()]
        if sum('"step"' in line for line in lines) > 2 * steps:
            return
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def wait_until_gone(run_dir, seconds):
    """The training processes that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while workers(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    return workers(run_dir)


@pytest.fixture(scope="module")
def one(copy_before_training, tmp_path_factory):
    """The session's series with other training settings, up to its training in one process."""
    run_dir = copy_before_training(tmp_path_factory.mktemp("processes") / "run")
    output = succeed("run", "--run-dir", run_dir, "--to", "5", *sets(*SETTINGS))
    assert output.count("done before") == 2, "02 and 03: the plan of 04 follows the training settings"
    return run_dir


@pytest.fixture(scope="module")
def copy_untrained(one, tmp_path_factory):
    """`copy_untrained()`: a copy of the run as it was before its training."""

    def copy():
        run_dir = shutil.copytree(one, tmp_path_factory.mktemp("processes") / "run")
        Run.open(run_dir).forget("05_training")
        shutil.rmtree(run_dir / "adapter")
        (run_dir / "training_log.jsonl").unlink()
        return run_dir

    return copy


@pytest.fixture
def on_the_cpu(monkeypatch):
    """For what this process trains itself: no GPU, here and in the processes it starts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def two(copy_untrained):
    """The run trained in two processes."""
    run_dir = copy_untrained()
    succeed("run", "--run-dir", run_dir, "--from", "5", "--to", "5", *sets("training.num_processes=2"))
    return run_dir


# --- the same training ---------------------------------------------------------------------------------------------


def test_two_processes_were_two_and_one_was_one(one, two):
    assert (newest_checkpoint(two) / "rng_state_1.pth").exists() and not (newest_checkpoint(one) / "rng_state_1.pth").exists()
    assert workers(two) == {}
    shown = (two / "notebooks" / "05_training.ipynb").read_text(encoding="utf-8")
    assert "2 processes x 2 rows x 1 micro-batches" in shown, "how they split a step"


def test_two_processes_match_the_losses_and_adapter_of_one(one, two):
    expected = logged(one)
    assert {step for key, step in expected if key == "loss"} == set(range(1, 21))
    assert {step for key, step in expected if key == "eval_loss"} == {10, 20}
    assert logged(two) == pytest.approx(expected, abs=1e-5)
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (two, one))
    assert ours.keys() == theirs.keys() and len(ours) == 28
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-5


def test_what_two_processes_trained_is_recorded_as_what_one_did(one, two):
    def kept(run_dir):
        entries = [json.loads(line) for line in (run_dir / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
        return {(key, entry["step"]): entry[key] for entry in entries for key in ("loss", "eval_loss") if key in entry}

    assert kept(two) == pytest.approx(kept(one), abs=1e-5)
    assert training_state(two)["state"] == "done"
    # The loss after is taken in the notebook's own process, with the weights that the others left.
    after = [json.loads(line) for line in (two / "held_out_loss.jsonl").read_text().splitlines()]
    before = {record["id"]: record["nll"] for record in after if record["model"] == "base"}
    assert sum(record["nll"] < before[record["id"]] for record in after if record["model"] == "tuned") > len(before) / 2


def test_the_notebook_shows_progress_and_loss_of_the_processes(one, two):
    shown = outputs_of_the_launch(two)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1, "one figure, drawn anew in its place"
    assert "20/20" in "".join("".join(output.get("text", [])) for output in shown)
    assert outputs_of_the_launch(one) == []


def test_only_an_epochs_short_last_step_is_filled_up(copy_untrained, on_the_cpu):
    # 12 rows, 8 to a step: the second step has 4, one process's share. accelerate gives the other the epoch's first rows, as
    # docs/gpu.md says: the weights after it are others, and the loss of the third step shows it.
    settings = ["training.per_device_train_batch_size=4", "training.max_steps=4", "training.eval_steps=null"]
    alone = changed(copy_untrained(), *settings)
    together = changed(copy_untrained(), *settings, "training.num_processes=2")
    train_in_processes(Run.open(alone), 1)
    train_in_processes(Run.open(together), 2)
    expected, found = logged(alone), logged(together)
    assert found["loss", 1] == pytest.approx(expected["loss", 1], abs=1e-5)
    assert found["loss", 3] != pytest.approx(expected["loss", 3], abs=1e-5), "no longer filled up: say so in docs/gpu.md"


# --- a process that fails ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(copy_untrained):
    """(run directory, exit code, stderr, seconds it took to end, processes left) after SIGKILL to the second process."""
    run_dir = copy_untrained()
    process = start(MEDCOT, "run", "--run-dir", run_dir, "--from", "5", "--to", "5", *sets("training.num_processes=2"))
    wait_for_steps(run_dir, process, steps=0)
    found = workers(run_dir)  # looked for before: its last step must not come while this looks
    assert set(found) == {None, "0", "1"}
    wait_for_steps(run_dir, process)
    found["1"].kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=300)
    return run_dir, process.returncode, errors, time.monotonic() - began, wait_until_gone(run_dir, 30)


def test_a_killed_process_ends_the_others_within_a_minute(killed):
    run_dir, code, errors, seconds, left = killed
    assert seconds < 60 and left == {}
    assert code == 1 and len(errors.strip().splitlines()) == 1
    assert errors.startswith("medcot: notebook 05_training failed: TrainingError: training in 2 processes failed: ")
    assert training_state(run_dir)["state"] == "failed"
    assert not (run_dir / "adapter").exists()


def test_the_error_names_the_killed_process_not_the_cut_off_one(killed):
    told = killed[2].partition("processes failed: ")[2]
    assert re.match(r"process 1\b", told) and re.search(r"SIGKILL|killed|signal 9", told)


def test_a_process_that_cannot_read_its_rows_is_named(copy_untrained, on_the_cpu):
    run_dir = copy_untrained()
    run = Run.open(run_dir)
    with (run_dir / "train_rows.parquet").open("ab") as rows:
        rows.write(b"x")
    expected = r"^training in 2 processes failed: process [01]: RunError: train_rows\.parquet in run/ is altered .* run notebook"
    with pytest.raises(TrainingError, match=expected):
        train_in_processes(run, 2)
    assert workers(run_dir) == {}


def test_the_processes_end_when_their_parent_is_killed(copy_untrained):
    run_dir = changed(copy_untrained(), *SETTINGS, "training.max_steps=2000", "training.num_processes=2")
    process = start(sys.executable, "-c", TRAIN, run_dir)
    try:
        wait_for_steps(run_dir, process)
        process.kill()
        process.wait(60)
        assert wait_until_gone(run_dir, 60) == {}
    finally:
        for left in workers(run_dir).values():
            left.kill()
        process.communicate()


# --- time that runs out --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paused(copy_untrained):
    """(run directory, exit code, stdout, stderr) of two processes whose time was over before they began."""
    run_dir = copy_untrained()
    settings = sets("training.num_processes=2", "training.max_hours=0.000001")
    return run_dir, *medcot("run", "--run-dir", run_dir, "--from", "5", "--to", "5", *settings)


def test_two_processes_pause_in_time_with_a_whole_checkpoint(paused):
    run_dir, code, output, errors = paused
    assert code == 75 and errors == ""
    assert "medcot: paused. 05_training: stopped after step 1 of 20, before training.max_hours ended" in output
    assert training_state(run_dir)["state"] == "paused"
    assert newest_checkpoint(run_dir).name == "checkpoint-1" and checkpoint_fault(newest_checkpoint(run_dir)) is None
    assert (newest_checkpoint(run_dir) / "rng_state_1.pth").exists()
    assert workers(run_dir) == {}


@pytest.mark.parametrize(
    "processes",
    [
        2,
        1,
    ],
)
def test_the_next_call_resumes_to_the_uninterrupted_runs_end(processes, paused, one, tmp_path, on_the_cpu):
    run_dir = shutil.copytree(paused[0], tmp_path / "run")
    train_in_processes(Run.open(changed(run_dir, *SETTINGS, f"training.num_processes={processes}")), processes)
    assert newest_checkpoint(run_dir).name == "checkpoint-20"
    assert logged(run_dir) == pytest.approx(logged(one), abs=1e-5)
