"""`medcot kaggle` with the real client, against a Kaggle on the loopback: what it sends, and what it makes of the answers."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest
from kaggle_server import USER, KaggleServer

from medcot_utils.cli import main
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run
from medcot_utils.series.kaggle.earlier import RUN_NAME
from medcot_utils.series.kaggle.session import leave_output

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    running = KaggleServer()
    yield running
    running.shutdown()


@pytest.fixture
def medcot(server, tmp_path, monkeypatch, capsys):
    """`medcot("push", …)`: the command as its entry point runs it, in `tmp_path/here`, with the server as its Kaggle."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)

    def call(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["medcot", "kaggle", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, ended.value.code or 0, said.out, said.err)

    return call


def succeed(done):
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return done.stdout


def the_one_error(done):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("medcot: "), done.stdout + done.stderr
    return lines[0]


# --- push ----------------------------------------------------------------------------------------------------------


def test_what_was_built_is_what_kaggle_receives(medcot, server, tmp_path):
    built = succeed(medcot("build", "--id", "ann/heart-run", "--set", "training.max_steps=7", "--continue-from", "ann/first-run"))
    assert "build/kaggle/heart-run.ipynb" in built and "profile article" in built
    assert succeed(medcot("push")) == "pushed ann/heart-run, version 1: https://www.kaggle.com/code/ann/heart-run\n"
    (sent,) = server.saved
    assert (sent["slug"], sent["newTitle"], sent["language"], sent["kernelType"]) == (
        "ann/heart-run",
        "heart run",
        "python",
        "notebook",
    )
    assert sent["isPrivate"] is True and sent["enableGpu"] is True and sent["enableInternet"] is True
    assert sent["machineShape"] == "NvidiaTeslaT4" and sent["kernelDataSources"] == ["ann/first-run"]
    written = nbformat.read(tmp_path / "here" / "build" / "kaggle" / "heart-run.ipynb", as_version=4)
    received = nbformat.reads(sent["text"], as_version=4)
    assert [cell.source for cell in received.cells] == [cell.source for cell in written.cells]
    assert received.metadata.kernelspec.name == "python3" and len(sent["text"]) < 750_000
    assert "training.max_steps=7" in received.cells[1].source


def test_an_image_that_is_fixed_by_hand_is_warned_of(medcot, server, tmp_path):
    succeed(medcot("build", "--id", "ann/heart-run"))
    metadata = tmp_path / "here" / "kernel-metadata.json"
    fixed = json.dumps(json.loads(metadata.read_text()) | {"docker_image": "image:1"})
    metadata.write_text(fixed)
    assert "kernel-metadata.json pins docker_image image:1: the session starts it" in succeed(medcot("push"))
    assert server.saved[0]["dockerImage"] == "image:1"
    assert "docker_image image:1 is dropped" in succeed(medcot("build", "--id", "ann/heart-run"))
    metadata.write_text(fixed)
    assert "pins docker_image image:1" in succeed(medcot("build", "--id", "ann/heart-run", "--keep-image"))


def test_the_pushed_text_holds_no_secret_of_this_machine(medcot, server):
    secrets = {"HF_TOKEN": "hf_marked0marked1marked2", "WANDB_API_KEY": "marked3" * 6}
    succeed(medcot("build", "--id", "ann/heart-run", **secrets))
    succeed(medcot("push", **secrets))
    text = json.dumps(server.saved) + "".join(carried_text(server.saved[0]["text"]))
    assert not [value for value in (*secrets.values(), server.token) if value in text]


def carried_text(notebook):
    """The texts of the files that a pushed notebook carries."""
    source = next(c.source for c in nbformat.reads(notebook, as_version=4).cells if c.source.startswith("PROJECT"))
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(source.split('"""')[1])), mode="r:xz") as archive:
        return [archive.extractfile(entry).read().decode() for entry in archive]


def test_kaggles_own_command_pushes_a_clean_checkout(server, tmp_path):
    checkout = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, checkout / name)
    environment = server.environment(tmp_path) | {"PYTHONPATH": str(checkout)}
    commands = (
        [sys.executable, "-m", "medcot_utils", "kaggle", "build", "--id", "ann/medcot-series"],
        [str(Path(sys.executable).with_name("kaggle")), "kernels", "push", "-p", "."],
    )
    for command in commands:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "successfully pushed" in done.stdout and "does not resolve" not in done.stdout
    assert server.saved[0]["slug"] == "ann/medcot-series" and "PROJECT" in server.saved[0]["text"]


def test_the_signed_in_user_owns_a_kernel_without_a_given_owner(medcot, server, tmp_path):
    assert "its owner is set by medcot kaggle push" in succeed(medcot("build", "--profile", "demo"))
    assert f"pushed {USER}/medcot-series" in succeed(medcot("push"))
    assert server.saved[0]["slug"] == f"{USER}/medcot-series" and "your-name" not in server.saved[0]["text"]
    assert server.saved[0]["enableGpu"] is False, "the embedded default needs no GPU, and takes no quota"
    assert json.loads((tmp_path / "here" / "kernel-metadata.json").read_text())["id"] == f"{USER}/medcot-series"


ANSWERS = {
    "error": ({"error": "Notebook title is\nalready in use"}, "Kaggle refused ann/heart-run: Notebook title is already in use"),
    "data set": (
        {"versionNumber": 1, "invalidDatasetSources": ["ann/gone"]},
        "no such dataset_sources, or you may not read them",
    ),
    "kernel": ({"versionNumber": 1, "invalidKernelSources": ["ann/gone"]}, "no such kernel_sources"),
    "model": ({"versionNumber": 1, "invalidModelSources": ["ann/gone"]}, "no such model_sources"),
    "another kernel": ({"ref": "ann/other-run", "versionNumber": 4}, "Kaggle saved ann/other-run (), not ann/heart-run"),
    "no name": ({"ref": "", "versionNumber": 4}, "Kaggle saved a kernel without a name (), not ann/heart-run"),
    "no version": ({"url": "https://www.kaggle.com/code/ann/heart-run"}, "no version number: nothing shows that it was saved"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_refusal_that_kaggles_command_accepts_is_an_error_here(case, medcot, server):
    answer, expected = ANSWERS[case]
    succeed(medcot("build", "--id", "ann/heart-run", "--dataset", "ann/gone", "--continue-from", "ann/gone-run"))
    server.answers["SaveKernel"] = (200, {"ref": "ann/heart-run", "url": "", **answer})
    done = medcot("push")
    assert expected in the_one_error(done) and "pushed" not in done.stdout


@pytest.mark.parametrize("ref", ["/code/ann/heart-run", "/ann/heart-run", "Ann/heart-run"])
def test_the_name_in_the_answer_may_be_written_as_an_address(ref, medcot, server):
    succeed(medcot("build", "--id", "ann/heart-run"))
    server.answers["SaveKernel"] = (200, {"ref": ref, "url": "", "versionNumber": 2})
    assert "pushed ann/heart-run, version 2" in succeed(medcot("push"))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "no Kaggle credentials that work"),
        (403, "Kaggle answered 403: not yours"),
        (429, "Kaggle answered 429"),
        (500, "Kaggle answered 500"),
    ],
)
def test_a_refused_call_is_one_line_with_its_status(status, expected, medcot, server):
    succeed(medcot("build", "--id", "ann/heart-run"))
    server.answers["SaveKernel"] = (status, {"code": status, "message": "not yours"})
    assert expected in the_one_error(medcot("push"))


def test_an_unreachable_kaggle_is_one_line(medcot, server):
    succeed(medcot("build", "--id", "ann/heart-run"))
    server.shutdown()
    server.server_close()
    assert "Kaggle cannot be reached" in the_one_error(medcot("push"))


@pytest.mark.parametrize("token", ["", "KGAT_of_somebody_else"])
def test_without_credentials_that_work_the_line_says_what_to_set(token, medcot, server):
    succeed(medcot("build", "--id", "ann/heart-run"))
    line = the_one_error(medcot("push", KAGGLE_API_TOKEN=token))
    assert "set KAGGLE_API_TOKEN" in line and "KGAT_" not in line and server.saved == []


def test_nothing_is_pushed_before_it_is_built(medcot, server, tmp_path):
    assert "make one with medcot kaggle build" in the_one_error(medcot("push"))
    succeed(medcot("build", "--id", "ann/heart-run"))
    (tmp_path / "here" / "build" / "kaggle" / "heart-run.ipynb").unlink()
    assert "heart-run.ipynb is not there yet: run medcot kaggle build" in the_one_error(medcot("push"))
    assert server.saved == []


# --- status --------------------------------------------------------------------------------------------------------


def test_status_reports_this_folders_kernel_or_the_named_one(medcot, server):
    assert succeed(medcot("status", "ann/other-run")) == "ann/other-run: complete\n"
    succeed(medcot("build", "--id", "ann/heart-run"))
    server.answers["GetKernelSessionStatus"] = (200, {"status": "RUNNING"})
    assert succeed(medcot("status")) == "ann/heart-run: running\n"


def test_a_failed_session_is_an_error_with_its_reason(medcot, server):
    server.answers["GetKernelSessionStatus"] = (200, {"status": "ERROR", "failureMessage": "cell 7\nraised"})
    line = the_one_error(medcot("status", "ann/heart-run"))
    assert "ended as error: cell 7 raised" in line and "medcot kaggle output ann/heart-run" in line
    server.answers["GetKernelSessionStatus"] = (403, {"code": 403, "message": "denied"})
    assert "Cannot access kernel 'ann/heart-run'" in the_one_error(medcot("status", "ann/heart-run"))


# --- output --------------------------------------------------------------------------------------------------------


@pytest.fixture
def left(run_factory, content, server, tmp_path):
    """The manifest of a run with a large merged model that a session left as output."""
    run = run_factory(name=RUN_NAME)

    def large(folder):
        (folder / "weights.bin").write_bytes(bytes(9_000_000))

    for name in ARTIFACTS:
        run.write(name, large if name == "merged" else content(name))
    for step in ("01_setup", "02_baseline_inference"):
        run.record_step(step, state="done", seconds=1.0, peak_memory_mb=1)
    manifest = run.manifest()
    leave_output(run.path)
    server.output = tmp_path / "output"
    server.output.mkdir()
    for path in (run.path, run.path.with_suffix(".zip")):
        path.rename(server.output / path.name)
    (server.output / "medcot").mkdir()
    (server.output / "medcot" / "pyproject.toml").touch()
    return manifest


def test_output_reassembles_the_run_without_the_merged_model(medcot, server, left, tmp_path):
    said = succeed(medcot("output", "ann/heart-run", "--run-dir", "runs/fetched"))
    run = Run.open(tmp_path / "here" / "runs" / "fetched")
    assert run.manifest() == left and "missing: merged" in said
    assert all(run.is_fresh(name) for name in left["artifacts"] if name != "merged")
    assert not any(name.startswith((f"{RUN_NAME}/merged", "medcot/")) for name in server.fetched)
    assert [path.name for path in run.path.parent.iterdir()] == ["fetched"], "nothing half fetched is left"


def test_checkpoints_come_along_while_the_training_needs_them(medcot, server, left, tmp_path):
    checkpoint = server.output / RUN_NAME / "checkpoints" / "abc" / "checkpoint-2" / "optimizer.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"moments")
    succeed(medcot("output", "ann/heart-run", "--run-dir", "runs/done"))
    assert not (tmp_path / "here" / "runs" / "done" / "checkpoints").exists()
    with zipfile.ZipFile(server.output / f"{RUN_NAME}.zip") as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(texts[f"{RUN_NAME}/manifest.json"])
    del manifest["artifacts"]["adapter"]
    with zipfile.ZipFile(server.output / f"{RUN_NAME}.zip", "w") as archive:
        for name, text in (texts | {f"{RUN_NAME}/manifest.json": json.dumps(manifest)}).items():
            archive.writestr(name, text)
    succeed(medcot("output", "ann/heart-run", "--run-dir", "runs/paused"))
    assert (tmp_path / "here/runs/paused/checkpoints/abc/checkpoint-2/optimizer.pt").read_bytes() == b"moments"


def test_all_fetches_the_merged_model_too(medcot, server, left, tmp_path):
    said = succeed(medcot("output", "ann/heart-run", "--all"))
    assert "not there" not in said and (tmp_path / "here/runs/kaggle/merged/weights.bin").stat().st_size == 9_000_000


def test_a_fetched_run_is_not_written_over(medcot, left):
    succeed(medcot("output", "ann/heart-run"))
    assert "runs/kaggle is not empty" in the_one_error(medcot("output", "ann/heart-run"))


def test_output_names_a_file_that_did_not_arrive(medcot, server, left):
    server.broken = f"{RUN_NAME}/adapter/weights.bin"  # the client saves the error page under the file's name
    assert "adapter of ann/heart-run differ from the manifest" in the_one_error(medcot("output", "ann/heart-run"))
    server.broken = f"{RUN_NAME}.zip"
    line = the_one_error(medcot("output", "ann/heart-run", "--run-dir", "runs/again"))
    assert f"{RUN_NAME}.zip of ann/heart-run arrived incomplete" in line


@pytest.mark.parametrize("name", [f"{RUN_NAME}/../../../escaped", f"{RUN_NAME}/adapter/../../../../escaped"])
def test_a_file_name_that_leads_out_of_the_output_is_refused(name, medcot, server, left, tmp_path):
    listed = [path.relative_to(server.output).as_posix() for path in server.output.rglob("*") if path.is_file()]
    root = f"http://127.0.0.1:{server.server_port}/output/"
    files = [{"url": root + one, "fileName": one} for one in listed]
    files.append({"url": f"{root}{RUN_NAME}/report.html", "fileName": name})
    server.answers["ListKernelSessionOutput"] = (200, {"files": files, "log": "[]", "nextPageToken": ""})
    line = the_one_error(medcot("output", "ann/heart-run", "--run-dir", "runs/fetched"))
    assert line.startswith(f"medcot: the output of ann/heart-run: '{name}' leads out of its folder")
    assert not list(tmp_path.rglob("escaped")) and not list((tmp_path / "here" / "runs").iterdir())


def test_a_packed_name_that_leads_out_of_the_output_is_refused(medcot, server, left, tmp_path):
    with zipfile.ZipFile(server.output / f"{RUN_NAME}.zip", "a") as archive:
        archive.writestr(f"{RUN_NAME}/../escaped", "out")
    line = the_one_error(medcot("output", "ann/heart-run", "--run-dir", "runs/fetched"))
    assert "the output of ann/heart-run holds no run" in line and f"'{RUN_NAME}/../escaped' leads out of its folder" in line
    assert not list((tmp_path / "here" / "runs").iterdir())


@pytest.mark.parametrize("name", ["../own.ipynb", "/tmp/own.ipynb", "build/../../own.ipynb"])
def test_a_notebook_outside_the_folder_is_never_pushed(name, medcot, server, tmp_path):
    succeed(medcot("build", "--id", "ann/heart-run"))
    metadata = tmp_path / "here" / "kernel-metadata.json"
    shutil.copyfile(tmp_path / "here" / "build" / "kaggle" / "heart-run.ipynb", tmp_path / "own.ipynb")
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"code_file": name}))
    assert f"code_file: kernel-metadata.json: '{name}'" in the_one_error(medcot("push"))
    assert server.saved == []


def test_an_output_without_a_run_says_so(medcot, server, tmp_path):
    server.output = tmp_path / "empty"
    server.output.mkdir()
    assert "holds no run: has its session ended?" in the_one_error(medcot("output", "ann/heart-run"))
