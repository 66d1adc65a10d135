"""What Kaggle received is run as Kaggle would run it: in an empty folder, first by a bare Python that has nothing of the
project, and then in pairs of sessions of which the second resumes what the first one left, in answers and in training.

MEDCOT_KAGGLE_PROFILE=demo runs the bare session on the embedded default instead of the tiny random model (ten minutes)."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import nbformat
import pytest
from kaggle_server import KaggleServer

from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.files import remove
from medcot_utils.series.kaggle import build, client
from medcot_utils.series.kaggle.earlier import RUN_NAME, copy_run, find_earlier

pytest_plugins = ("wandb_server",)

ROOT = Path(__file__).parents[2]
# What a Kaggle image has of itself; everything else the pushed notebook must bring.
BARE = ("papermill", "ipykernel")
SECRET = "hf_" + "marked" * 6  # of a Hub token's shape
SMALL = {
    "smoke": [],
    "demo": [
        "training.max_steps=2",
        "training.warmup_steps=0",
        "training.eval_steps=2",
        "training.eval_rows=2",
        "dataset.num_rows=8",
        "dataset.held_out_rows=4",
        "generation.max_new_tokens=8",
        "evaluation.num_questions=4",
        "evaluation.n_samples=0",
        "evaluation.mcq_limit=4",
        "evaluation.mcq_max_new_tokens=4",
        "export.check_rows=2",
        "export.check_prompts=1",
        "export.check_new_tokens=4",
    ],
}


@pytest.fixture
def received(tmp_path, monkeypatch):
    """`received("ann/one-run", "smoke", settings)`: built, pushed with the real client, and the text that Kaggle then has."""
    server = KaggleServer()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def push(kernel, profile, settings=(), continue_from=()):
        with monkeypatch.context() as patch:
            for name, value in server.environment(tmp_path).items():
                patch.setenv(name, value)
            folder = tmp_path / "pushed" / kernel
            build.build(folder, profile, settings, kernel, continue_from)
            assert client.push(folder).version == len(server.saved)
        return server.saved[-1]["text"]

    yield push
    server.shutdown()


def session(python, text, place, **variables):
    """Run the text in `place` with Kaggle's environment around it, as Kaggle does, with papermill: (process, executed cells).

    Its home folder ends with it, and so would a key of the user's."""
    for name in ("working", "input", "elsewhere", "home"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "received.ipynb").write_text(text)
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "MEDCOT_NOTEBOOKS", "MEDCOT_RUN_DIR", "MEDCOT_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "MEDCOT_KAGGLE_ROOT": str(place), "CUDA_VISIBLE_DEVICES": ""}
    environment["HUGGINGFACE_TOKEN"] = SECRET
    environment["PATH"] = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    if python == sys.executable:  # the environment of the tests has every pin, and must not be changed if it had not
        environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
        environment |= {"HOME": str(place / "home"), "XDG_CONFIG_HOME": str(place / "home" / ".config")} | variables
    command = [str(python), "-m", "papermill", "-k", "python3", "--no-progress-bar", "../received.ipynb", "../executed.ipynb"]
    done = subprocess.run(
        command, cwd=place / "elsewhere", env=environment, capture_output=True, text=True, timeout=2400, check=False
    )
    executed = nbformat.read(place / "executed.ipynb", as_version=4)
    assert "Hugging Face: environment HUGGINGFACE_TOKEN" in said(executed.cells)
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()] and SECRET not in done.stdout + done.stderr
    assert list((place / "elsewhere").iterdir()) == [], "everything is written below the session's own folders"
    return done, [cell for cell in executed.cells if cell.cell_type == "code"]


def said(cells):
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def assert_complete(place):
    """Zip, adapter and report are there, and put together again they are a whole run."""
    working = place / "working"
    assert {path.name for path in working.iterdir()} == {RUN_NAME, f"{RUN_NAME}.zip"}, "no code is handed on"
    assert (working / RUN_NAME / "adapter" / "adapter_model.safetensors").is_file()
    assert (working / RUN_NAME / "report.html").is_file()
    loose = [path for path in working.rglob("*") if path.is_file()]
    assert len(loose) < 30, "the many small files are in the zip"
    (earlier,) = find_earlier(working)
    copy_run(earlier, place / "again")
    run = Run.open(place / "again")
    # The merged model lay on Kaggle's scratch disk, which ends with the session: fetched, the run has all but that.
    (merged,) = (place / "tmp" / "medcot").glob("*/merged/*.safetensors")
    assert not [path for path in (working / RUN_NAME).iterdir() if path.name == "merged"] and merged.stat().st_size > 0
    assert {name: run.step_state(name) for name in STEPS} == dict.fromkeys(STEPS, "done") | {"07_export": "stale"}
    assert set(run.manifest()["artifacts"]) == set(filter(run.wants, ARTIFACTS))
    return run


@pytest.mark.timeout(2400)
def test_a_bare_session_completes_the_series(received, tmp_path):
    profile = os.environ.get("MEDCOT_KAGGLE_PROFILE", "smoke")
    text = received("ann/one-run", profile, SMALL[profile])
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = re.findall(rf"^(?:{'|'.join(BARE)})==\S+", (ROOT / "requirements-cpu.txt").read_text(), re.MULTILINE)
    assert len(pins) == len(BARE)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True, capture_output=True)
    lacking = subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False)
    assert lacking.returncode != 0, "the environment is bare"

    done, cells = session(python, text, tmp_path / "kaggle")
    assert done.returncode == 0, done.stderr[-2000:]
    run = assert_complete(tmp_path / "kaggle")
    assert run.config.profile == profile
    assert "pins to install" in said(cells) and "The series is complete" in said(cells)
    assert any("<iframe" in output.get("data", {}).get("text/html", "") for cell in cells for output in cell.outputs)
    assert "\x1b[" not in said(cells), "a saved notebook holds lines, not a terminal's drawing"
    versions = json.loads((tmp_path / "kaggle" / "again" / "machine.json").read_text())["versions"]
    assert versions["torch"].startswith("2.13.0")


def mount(run_dir, place, name):
    """Make a run, or all that a session left, an input of the session in `place`, as Kaggle mounts another notebook's output."""
    mounted = place / "input" / "notebooks" / "ann" / name
    mounted.parent.mkdir(parents=True)
    run_dir.rename(mounted)


PAUSES = {
    "02_baseline_inference": ("likelihood, base: stopped after 0 of 4", "4 of 4 answers were made before and are kept"),
    "06_comparison": ("likelihood, tuned: stopped after 0 of 4", "4 of 4 answers were made before and are kept"),
}


@pytest.fixture
def run_before(smoke_series, tmp_path):
    """`run_before(step)`: the smoke series as it was before that notebook began; None before 02."""

    def make(step):
        if step == "02_baseline_inference":
            return None
        run_dir = shutil.copytree(smoke_series / "run", tmp_path / "before")
        run = Run.open(run_dir)
        for later in list(STEPS)[list(STEPS).index(step) :]:
            for name in STEPS[later].makes:
                remove(run_dir / ARTIFACTS[name].file)
            run.forget(later)
        return run_dir

    return make


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("step", PAUSES)
def test_a_second_session_resumes_what_the_first_one_left(step, received, run_before, tmp_path):
    before, (stopped, resumed) = run_before(step), PAUSES[step]
    if before:
        mount(before, tmp_path / "first", "earlier")
    text = received("ann/one-run", "smoke", ["training.max_hours=0.000001"])
    first, cells = session(sys.executable, text, tmp_path / "first")
    assert first.returncode == 0, first.stderr[-2000:]
    assert "all" in said(cells) and "pins are satisfied, nothing to install" in said(cells)
    assert f"medcot: paused. {step}: {stopped}" in said(cells) and "nothing failed. To resume in another session" in said(cells)
    assert "--id ann/one-run-2 --continue-from ann/one-run --profile smoke --set training.max_hours=0.000001" in said(cells)
    assert (tmp_path / "first" / "working" / f"{RUN_NAME}.zip").is_file()

    mount(tmp_path / "first" / "working", tmp_path / "second", "one-run")
    text = received("ann/one-run-2", "smoke", continue_from=["ann/one-run"])
    second, cells = session(sys.executable, text, tmp_path / "second")
    assert second.returncode == 0, second.stderr[-2000:]
    done = list(STEPS).index(step)
    assert f"{done} notebooks are done there" in said(cells) and "The series is complete" in said(cells)
    assert all(f"{name}: skipped, done before" in said(cells) for name in list(STEPS)[1:done])
    run = assert_complete(tmp_path / "second")
    assert resumed in (run.path / "notebooks" / f"{step}.ipynb").read_text()


# --- accounts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def accounts(wandb_server, monkeypatch):
    """A Hub on which the session's token is ann's, and what sends the sessions there and to W&B."""
    monkeypatch.setitem(hub_server.USERS, SECRET, ("ann", "write"))
    with hub_server.Hub() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "WANDB_BASE_URL": wandb_server.address}
        yield hub, variables | {"WANDB_API_KEY": wandb_server.key, "HF_HUB_OFFLINE": "0"}


def tracked(server):
    """What W&B holds: {id of a run: (project, how many of its steps have a loss)}."""
    runs = server.held("select run_id, name from runs join projects on projects.id = project_id")
    steps = "select distinct step from metrics where run_id = ? and key = 'train/loss'"
    return {run: (project, len(server.held(steps, run))) for run, project in runs}


@pytest.mark.timeout(1200)
def test_a_second_session_tracks_and_pushes_as_the_first(received, run_before, accounts, wandb_server, tmp_path):
    (hub, variables), before = accounts, tracked(wandb_server)
    settings = ["tracking.backend=wandb", "tracking.project=hearts", "hub.repo_id=ann/hearts"]
    mount(run_before("05_training"), tmp_path / "first", "earlier")
    text = received("ann/one-run", "smoke", [*settings, "training.max_hours=0.000001"])
    first, cells = session(sys.executable, text, tmp_path / "first", **variables)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "medcot: paused. 05_training: stopped after step 1 of 6" in said(cells)
    (mine,) = set(tracked(wandb_server)) - set(before)
    assert hub.repos == {}

    # The next session's notebook is built by the command that this one printed, and so gives the same settings.
    command = shlex.split(said(cells).rpartition("from a checkout: ")[2].partition(" && ")[0])
    again = [given for option, given in itertools.pairwise(command) if option == "--set"]
    assert again == [*settings, "training.max_hours=0.000001"]
    mount(tmp_path / "first" / "working", tmp_path / "second", "one-run")
    text = received("ann/one-run-2", "smoke", again[:-1], continue_from=["ann/one-run"])
    second, cells = session(sys.executable, text, tmp_path / "second", **variables)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "4 notebooks are done there" in said(cells) and "The series is complete" in said(cells)
    run = assert_complete(tmp_path / "second")
    assert "resuming after step 1 of 6 (checkpoint-1)" in (run.path / "notebooks" / "05_training.ipynb").read_text()

    now = tracked(wandb_server)
    assert set(now) - set(before) == {mine} and now[mine] == ("hearts", 6), "one tracked run"
    assert hub.repos["model", "ann/hearts"]["private"] and hub.repos["model", "ann/hearts"]["tags"]
    assert "because you did not set" not in said(cells)


@pytest.mark.timeout(1200)
def test_a_strangers_run_is_trained_on_and_nothing_sent(received, run_before, accounts, wandb_server, tmp_path):
    (hub, variables), before = accounts, tracked(wandb_server)
    run_dir = run_before("05_training")
    values = json.loads((run_dir / "config.json").read_text())
    values["hub"] |= {"repo_id": "ann/hearts", "private": False}
    values["tracking"] |= {"backend": "wandb", "mode": "online", "entity": "mallory", "project": "taken"}
    values["secrets"] |= {"wandb": ["BANK_PIN"], "huggingface": ["BANK_PIN"]}
    (run_dir / "config.json").write_text(json.dumps(values))
    mount(run_dir, tmp_path / "kaggle", "a-strangers-run")
    text = received("ann/one-run", "smoke", ["tracking.backend=auto"], continue_from=["mallory/a-strangers-run"])
    done, cells = session(sys.executable, text, tmp_path / "kaggle", **variables, BANK_PIN="the number of my account")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 notebooks are done there" in said(cells) and "The series is complete" in said(cells)
    assert tracked(wandb_server) == before and hub.requests == []
    run = assert_complete(tmp_path / "kaggle")
    assert run.manifest()["steps"]["05_training"]["state"] == "done"
    named = "tracking.project, tracking.entity, tracking.mode, secrets.huggingface, secrets.wandb"
    assert f"{named}, because you did not set them" in said(cells) and "--set hub.repo_id=ann/hearts" in said(cells)


def test_a_failed_series_fails_the_session_and_keeps_its_results(received, tmp_path):
    text = received("ann/one-run", "smoke", ["dataset.path=/kaggle/input/gone/rows.jsonl"])
    done, cells = session(sys.executable, text, tmp_path / "kaggle")
    assert done.returncode != 0 and "the series ended with exit code 1; its last lines above say why" in done.stderr
    assert "rows.jsonl" in said(cells) and "Traceback" not in said(cells)
