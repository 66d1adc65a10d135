"""Work that is killed: told as such, resumed from what is whole on the disk, and ending where it would have ended.

MEDCOT_KILLS sets how often the answers of a notebook are killed, each time at another moment; MEDCOT_SEED which moments."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.files import remove
from medcot_utils.run.journal import Journal

MEDCOT = Path(sys.executable).with_name("medcot")
SETTINGS = ("--set", "training.max_steps=40", "--set", "training.save_steps=5")
KILLS = int(os.environ.get("MEDCOT_KILLS") or 1)
SEED = int(os.environ.get("MEDCOT_SEED") or 1)


def start(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [str(MEDCOT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def succeed(*arguments):
    process = start(*arguments)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, output + errors
    return output


def kernels_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ipykernel" in " ".join(child.cmdline())]


def training_state(run_dir):
    steps = json.loads(succeed("status", run_dir, "--json"))["steps"]
    return next(step for step in steps if step["name"] == "05_training")


def checkpoints(run_dir):
    """The checkpoint folders by step, oldest first."""
    found = [path for path in run_dir.glob("checkpoints/*/checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def printed(run_dir, step="05_training"):
    """What the executed notebook printed."""
    notebook = json.loads((run_dir / "notebooks" / f"{step}.ipynb").read_text(encoding="utf-8"))
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
            kernels = kernels_of(process)
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


# --- answers -------------------------------------------------------------------------------------------------------

ASKING = {"02_baseline_inference": ("base_mcq", "base_answers"), "06_comparison": ("tuned_mcq", "tuned_answers")}
BATCH = 4
LONGER = (
    "generation.max_new_tokens=96",
    "evaluation.answer_tokens=16",
    "evaluation.n_samples=3",
    f"generation.batch_size={BATCH}",
)


def kept(run_dir, name):
    """The records of an artifact that are on the disk, finished or not."""
    finished = run_dir / ARTIFACTS[name].file
    if finished.exists():
        return [json.loads(line) for line in finished.read_text(encoding="utf-8").splitlines()]
    part = part_of(run_dir, name)
    return Journal(part, json.loads(begun.splitlines()[0])["made_from"]).read() if (begun := read(part)) else []


def part_of(run_dir, name):
    return run_dir / f"{ARTIFACTS[name].file}.part"


def read(path):
    """What a file holds that another process may just have removed."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def count_kept(run_dir, step):
    return sum(len(kept(run_dir, name)) for name in ASKING[step])


@pytest.fixture(scope="module")
def answered(smoke_series, tmp_path_factory):
    """The session's series with longer answers, up to notebook 06."""
    run_dir = shutil.copytree(smoke_series / "run", tmp_path_factory.mktemp("answered") / "run")
    for name in STEPS["07_export"].makes:  # not needed, and large
        remove(run_dir / ARTIFACTS[name].file)
    settings = [part for setting in LONGER for part in ("--set", setting)]
    assert succeed("run", "--run-dir", run_dir, "--to", "6", *settings).count("done before") == 3, "03 to 05"
    return run_dir


def kill_at(run_dir, step, records, delay, whole):
    """Run a notebook and kill it once so many records are kept, after a delay: its kernel, or all of its processes."""
    process = start("run", "--run-dir", run_dir, "--to", step[:2])
    deadline = time.monotonic() + 600
    while count_kept(run_dir, step) < records:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    kernels = kernels_of(process)
    time.sleep(delay)
    for victim in [psutil.Process(process.pid), *kernels] if whole else kernels:
        victim.kill()
    _, errors = process.communicate(timeout=300)
    assert whole or f"notebook {step} failed: its kernel died" in errors


def copy_without(step, answered, run_dir):
    """Copy the run anew as it was before a step."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(answered, run_dir)
    for name in STEPS[step].makes:
        remove(run_dir / ARTIFACTS[name].file)
    Run.open(run_dir).forget(step)


@pytest.mark.parametrize("kill", range(KILLS))
@pytest.mark.parametrize("step", ASKING)
def test_killed_answers_go_on_where_they_were(answered, step, kill, tmp_path):
    chance = random.Random(f"{SEED} {step} {kill}")
    run_dir = tmp_path / "run"
    expected = {name: kept(answered, name) for name in ASKING[step]}
    count = sum(map(len, expected.values()))
    assert count == 4 + 28
    # Between the first and the last batch, and at any moment of the making of one.
    a_batch = BATCH * sum(record["seconds"] for record in expected[ASKING[step][1]]) / 28
    before = expected
    while sum(map(len, before.values())) == count:  # on a busy machine a kill may come too late: then at another moment
        copy_without(step, answered, run_dir)
        kill_at(run_dir, step, chance.randint(1, count - BATCH), chance.uniform(0, 0.9 * a_batch), whole=kill % 2 == 0)
        before = {name: kept(run_dir, name) for name in expected}
    unfinished = {name: begun for name in expected if (begun := read(part_of(run_dir, name)))}
    print(f"killed with { ({name: len(records) for name, records in before.items()}) } records kept, {sorted(unfinished)} begun")
    assert any(before.values())

    process = start("run", "--run-dir", run_dir, "--to", step[:2])
    while process.poll() is None:  # what is kept stays, and is only added to
        for name, begun in unfinished.items():
            now = read(part_of(run_dir, name))
            assert not now or now.startswith(begun[: begun.rfind(b"\n") + 1])
        time.sleep(0.01)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    for name, records in expected.items():
        after = kept(run_dir, name)
        assert untimed(after) == untimed(records) and not part_of(run_dir, name).exists()
        if "mcq" in name and name in unfinished:  # what is kept of these on the way are answers, without the question
            assert {record["completion"] for record in before[name]} <= {record["completion"] for record in after}
        else:
            assert all(record in after for record in before[name]), "with its seconds: it was not asked again"
        if before[name] and name in unfinished:
            assert f"{len(before[name])} of {len(records)} answers were made before and are kept" in printed(run_dir, step)


def untimed(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]
