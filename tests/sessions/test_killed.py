"""A training whose kernel is killed: told as such, resumed from a whole checkpoint, and ending where it would have ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

MEDCOT = Path(sys.executable).with_name("medcot")
SETTINGS = ("--set", "training.max_steps=40", "--set", "training.save_steps=5")


def start(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [str(MEDCOT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def succeed(*arguments):
    process = start(*arguments)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, output + errors
    return output


def training_state(run_dir):
    steps = json.loads(succeed("status", run_dir, "--json"))["steps"]
    return next(step for step in steps if step["name"] == "05_training")


def checkpoints(run_dir):
    """The checkpoint folders by step, oldest first."""
    found = [path for path in run_dir.glob("checkpoints/*/checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def printed(run_dir):
    """What the executed training notebook printed."""
    notebook = json.loads((run_dir / "notebooks" / "05_training.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def logged(run_dir):
    entries = [json.loads(line) for line in (run_dir / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(key, entry["step"]): entry[key] for entry in entries for key in ("loss", "eval_loss") if key in entry}


@pytest.fixture(scope="module")
def prepared(copy_before_training, tmp_path_factory):
    """The session's series with other training settings, notebooks 1 to 4 done (01 and 04 again)."""
    run_dir = copy_before_training(tmp_path_factory.mktemp("killed") / "run")
    assert succeed("run", "--run-dir", run_dir, "--to", "4", *SETTINGS).count("done before") == 2
    return run_dir


@pytest.fixture(scope="module")
def uninterrupted(prepared):
    run_dir = shutil.copytree(prepared, prepared.parent / "uninterrupted" / "run")
    succeed("run", "--run-dir", run_dir, "--to", "5")
    return run_dir


@pytest.fixture(scope="module")
def killed(prepared):
    """(run directory, exit code, stderr) of a training whose kernel was killed after its second checkpoint appeared."""
    run_dir = shutil.copytree(prepared, prepared.parent / "killed" / "run")
    process = start("run", "--run-dir", run_dir, "--to", "5")
    deadline = time.monotonic() + 600
    kernels = []
    while len(checkpoints(run_dir)) < 2:  # the first is whole then; the second may be, or be half written
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
        if checkpoints(run_dir) and not kernels:  # looked for before: the last step must not come while this looks
            kernels = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if "ipykernel" in " ".join(child.cmdline())
            ]
    assert len(kernels) == 1
    kernels[0].kill()
    _, errors = process.communicate(timeout=300)
    return run_dir, process.returncode, errors


def assert_ends_as(run_dir, uninterrupted):
    expected = logged(uninterrupted)
    assert {step for key, step in expected if key == "loss"} == set(range(1, 41))
    assert logged(run_dir) == pytest.approx(expected, abs=1e-6)
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run_dir, uninterrupted))
    assert ours.keys() == theirs.keys() and len(ours) == 28
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-6
    assert training_state(run_dir)["state"] == "done"


def test_a_killed_kernel_is_one_line_that_names_the_notebook(killed):
    run_dir, code, errors = killed
    assert code == 1
    assert len(errors.strip().splitlines()) == 1
    assert errors.startswith("medcot: notebook 05_training failed: its kernel died")
    assert "run/notebooks/05_training.ipynb" in errors and (run_dir / "notebooks" / "05_training.ipynb").exists()
    state = training_state(run_dir)
    assert state["state"] == "failed" and "kernel died" in state["error"]
    assert not (run_dir / "adapter").exists() and not (run_dir / "training_log.jsonl").exists()


def test_the_same_command_resumes_a_killed_run_to_the_same_end(killed, uninterrupted, tmp_path):
    run_dir = shutil.copytree(killed[0], tmp_path / "run")
    output = succeed("run", "--run-dir", run_dir, "--to", "5")
    assert output.count("done before") == 4, "only the training is done again"
    assert "resuming after step" in printed(run_dir) and "of 40" in printed(run_dir)
    assert "resuming" not in printed(uninterrupted)
    assert_ends_as(run_dir, uninterrupted)


def test_a_truncated_checkpoint_is_set_aside_for_the_one_before(killed, uninterrupted, tmp_path):
    run_dir = shutil.copytree(killed[0], tmp_path / "run")
    older, newest = checkpoints(run_dir)[-2:]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if weights.exists() else b"")
    succeed("run", "--run-dir", run_dir, "--to", "5")
    said = printed(run_dir)
    assert f"{newest.name} is not whole" in said
    assert f"resuming after step {older.name.removeprefix('checkpoint-')} of 40 ({older.name})" in said
    assert newest.with_name(f"broken-{newest.name}").is_dir() and len(checkpoints(run_dir)) == 2, (
        "two whole ones are kept beside it"
    )
    assert_ends_as(run_dir, uninterrupted)
