"""Inside a Kaggle session: an earlier run is found by its manifest wherever it lies, and the run is left whole as output."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest

from medcot_utils.run.directory import Run
from medcot_utils.series.kaggle import session


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A session's folders."""
    for name in ("working", "input"):
        (tmp_path / "kaggle" / name).mkdir(parents=True)
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    return tmp_path / "kaggle"


@pytest.fixture
def finished(run_factory, write_all):
    """A run with every artifact and three notebooks done, as a session would leave it in its working folder."""
    run = write_all(run_factory(name=session.RUN_NAME))
    for step in ("01_setup", "02_baseline_inference", "03_dataset_prep"):
        run.record_step(step, state="done", seconds=1.0, peak_memory_mb=1)
    (run.path / "notebooks").mkdir()
    (run.path / "notebooks" / "01_setup.ipynb").write_text("{}")
    return run


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def move_output(run, place):
    place.mkdir(parents=True)
    for path in (run.path, run.path.with_suffix(".zip")):
        if path.exists():
            path.rename(place / path.name)


def test_small_files_are_zipped_beside_adapter_and_report(finished):
    checkpoint = finished.path / "checkpoints" / "abc" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(bytes(8_000_000))
    (checkpoint / "trainer_state.json").write_text("{}")
    before = contents(finished.path)
    archive = session.leave_output(finished.path)
    left = contents(finished.path)
    assert set(left) == {"report.html", "adapter/weights.bin", "checkpoints/abc/checkpoint-2/optimizer.pt"}
    with zipfile.ZipFile(archive) as packed:
        inside = {name.removeprefix(f"{session.RUN_NAME}/"): packed.read(name) for name in packed.namelist()}
    assert left | inside == before and not set(left) & set(inside)
    assert sorted(path.name for path in finished.path.parent.iterdir() if path.name.startswith((".", "medcot"))) == [
        session.RUN_NAME,
        f"{session.RUN_NAME}.zip",
    ]


def test_a_link_to_a_folder_that_is_packed_goes_with_it(finished, kaggle):
    wandb = finished.path / "tracking" / "wandb"
    (wandb / "run-1").mkdir(parents=True)
    (wandb / "run-1" / "log").write_text("tracked")
    (wandb / "latest-run").symlink_to("run-1")  # as W&B makes it: sorted before what it names
    session.leave_output(finished.path)
    assert not (finished.path / "tracking").exists()
    session.unpack_own(finished.path)
    assert (wandb / "run-1" / "log").read_text() == "tracked"


@pytest.mark.parametrize("cell", ["resume_earlier_run", "leave_output"])
def test_a_cell_run_a_second_time_finds_the_run_whole(cell, finished, kaggle):
    before = contents(finished.path)
    session.leave_output(finished.path)
    if cell == "leave_output":
        session.leave_output(finished.path)
    session.resume_earlier_run(finished.path, "smoke")
    assert contents(finished.path) == before and not finished.path.with_suffix(".zip").exists()


def test_a_file_made_since_is_not_replaced_by_the_one_in_the_zip(finished, kaggle):
    session.leave_output(finished.path)
    (finished.path / "plan.json").write_text("newer")
    session.resume_earlier_run(finished.path, "smoke")
    assert (finished.path / "plan.json").read_text() == "newer" and (finished.path / "manifest.json").exists()


PLACES = ["medcot-series", "notebooks/ann/medcot-series/output", "a data set/version 3/deep/er"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packed", [True, False])
def test_an_earlier_run_is_found_wherever_it_is_mounted(packed, place, finished, kaggle):
    before = contents(finished.path)
    if packed:
        session.leave_output(finished.path)
    move_output(finished, kaggle / "input" / place)
    said = []
    session.resume_earlier_run(kaggle / "working" / session.RUN_NAME, "smoke", say=said.append)
    assert contents(kaggle / "working" / session.RUN_NAME) == before
    assert said[-1].endswith("3 notebooks are done there")
    assert [path.name for path in (kaggle / "working").iterdir()] == [session.RUN_NAME]


def test_a_data_set_with_the_zip_unpacked_is_a_run_too(finished, kaggle):
    before = contents(finished.path)
    archive = session.leave_output(finished.path)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(finished.path)
    archive.unlink()
    move_output(finished, kaggle / "input" / "rows")
    session.resume_earlier_run(kaggle / "working" / "run", "smoke")
    assert contents(kaggle / "working" / "run") == before


def test_the_furthest_run_with_the_right_profile_is_resumed(finished, run_factory, kaggle):
    behind = run_factory(name="behind")
    behind.record_step("01_setup", state="done")
    other = run_factory(name="other", profile="demo")
    for step in ("01_setup", "02_baseline_inference", "03_dataset_prep", "04_lora_config"):
        other.record_step(step, state="done")
    for run, name in ((behind, "a"), (other, "b"), (finished, "c")):
        move_output(run, kaggle / "input" / name)
    (kaggle / "input" / "web").mkdir()
    (kaggle / "input" / "web" / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    (kaggle / "input" / "web" / "broken.zip").write_bytes(b"PK not a zip")
    said = []
    session.resume_earlier_run(kaggle / "working" / "run", "smoke", say=said.append)
    assert Run.open(kaggle / "working" / "run").step_state("03_dataset_prep") == "done"
    assert any("a run of profile demo and embedded:smollm2-135m-instruct, left alone" in line for line in said)


def test_a_run_in_the_working_folder_wins_over_the_inputs(finished, run_factory, kaggle):
    move_output(finished, kaggle / "input" / "earlier")
    own = run_factory(name="kaggle/working/run")
    session.resume_earlier_run(own.path, "smoke")
    assert own.manifest()["steps"] == {}


def test_without_an_earlier_run_nothing_is_made(kaggle):
    said = []
    session.resume_earlier_run(kaggle / "working" / "run", "smoke", say=said.append)
    assert said == ["no earlier run among the inputs: starting from the beginning"]
    assert list((kaggle / "working").iterdir()) == []


def test_a_notebook_opened_by_hand_takes_an_earlier_run_up_too(finished, kaggle):
    move_output(finished, kaggle / "input" / "earlier")
    bare = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    code = "from medcot_utils.series.notebook import start; print(start('auto'))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_dir = kaggle / "working" / "runs" / "notebooks"
    assert done.stdout.splitlines()[-1] == str(run_dir) and Run.open(run_dir).step_state("03_dataset_prep") == "done"


def test_a_merged_model_without_room_is_left_out_and_said(finished, kaggle, monkeypatch):
    move_output(finished, kaggle / "input" / "earlier")
    usage = shutil.disk_usage(kaggle)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000_000))
    said = []
    session.resume_earlier_run(kaggle / "working" / "run", "smoke", say=said.append)
    copied = contents(kaggle / "working" / "run")
    assert "adapter/weights.bin" in copied and not any(name.startswith("merged/") for name in copied)
    assert "too little room for the earlier run's merged model" in said[0]


def test_a_zip_that_points_outside_writes_nothing_there(finished, kaggle):
    move_output(finished, kaggle / "input" / "earlier")
    run = kaggle / "input" / "earlier" / session.RUN_NAME
    with zipfile.ZipFile(run.with_suffix(".zip"), "w") as archive:
        for name in ("manifest.json", "config.json"):
            archive.writestr(f"{session.RUN_NAME}/{name}", (run / name).read_text())
            (run / name).unlink()
        archive.writestr(f"{session.RUN_NAME}/../../escaped.txt", "out")
    said = []
    session.resume_earlier_run(kaggle / "working" / "run", "smoke", say=said.append)
    assert not list(kaggle.rglob("escaped.txt")) and not (kaggle / "working" / "run").exists()
    assert f"{session.RUN_NAME}.zip: '{session.RUN_NAME}/../../escaped.txt' leads out of its folder" in said[0]


@pytest.mark.parametrize("inputs", ["nothing", "another profile"])
def test_a_session_meant_to_resume_never_starts_over(inputs, kaggle, run_factory):
    if inputs == "another profile":
        move_output(run_factory(name="other", profile="demo"), kaggle / "input" / "other")
    run_dir = kaggle / "working" / "run"
    with pytest.raises(
        session.SessionError, match=r"no earlier run of profile smoke .* resume ann/first-run, ann/rows\."
    ) as raised:
        session.resume_earlier_run(run_dir, "smoke", [], ["ann/first-run", "ann/rows"])
    assert "To start from the beginning" in str(raised.value) and not run_dir.exists()
    said = []
    session.resume_earlier_run(run_dir, "smoke", [], [], say=said.append)
    assert said[-1] == "no earlier run among the inputs: starting from the beginning"


def test_the_series_process_passes_on_its_lines_and_exit_code(tmp_path, capsys):
    code = session.run_medcot(tmp_path / "run", "smoke", ["training.max_step=3"])
    assert code == 1 and "did you mean training.max_steps" in capsys.readouterr().out


def test_what_the_series_prints_holds_no_secret(kaggle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token := "a token of any form")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f"#!/bin/sh\necho refused: {token}\necho {token.encode().hex()} >&2\n")
    (tmp_path / "python").chmod(0o755)
    assert session.run_medcot(tmp_path / "run", "smoke", []) == 0
    assert capsys.readouterr().out == "refused: **********\n**********\n"


def test_secrets_are_handed_on_and_only_their_places_are_shown(kaggle, monkeypatch, capsys):
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_verysecretvalue0123456789")
    session.read_secrets("smoke")
    said = capsys.readouterr().out
    assert "Hugging Face: environment HUGGINGFACE_TOKEN" in said and "verysecret" not in said
    assert session._environment()["HF_TOKEN"] == "hf_verysecretvalue0123456789"


def test_secrets_are_read_under_the_names_that_the_settings_say(kaggle, monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "hf_verysecretvalue0123456789")
    session.read_secrets("smoke", ["secrets.huggingface=MY_TOKEN"])
    assert "Hugging Face: environment MY_TOKEN" in capsys.readouterr().out
    assert session._environment()["HF_TOKEN"] == "hf_verysecretvalue0123456789"


def test_a_pause_says_how_to_resume_and_a_failure_fails(capsys):
    session.end(0, "ann/medcot-series", "article")
    assert "medcot kaggle output ann/medcot-series" in capsys.readouterr().out
    settings = ["training.max_steps=7", "dataset.path=/kaggle/input/my rows.jsonl"]
    session.end(75, "ann/medcot-series", "recommended", settings)
    again = capsys.readouterr().out.rpartition("checkout: ")[2].strip()
    said, _, push = again.partition(" && ")
    words = shlex.split(said)
    assert words[:3] == ["medcot", "kaggle", "build"] and push == "medcot kaggle push"
    options = list(zip(words[3::2], words[4::2], strict=True))
    assert options == [
        ("--id", "ann/medcot-series-2"),
        ("--continue-from", "ann/medcot-series"),
        ("--profile", "recommended"),
        *(("--set", setting) for setting in settings),
    ]
    with pytest.raises(session.SessionError, match="exit code 1; its last lines above say why"):
        session.end(1, "ann/medcot-series", "article")
    assert session.next_kernel("ann/medcot-series-2") == "ann/medcot-series-3"


def test_the_report_is_shown_in_a_frame_of_its_own(finished):
    frame = session.show_report(finished.path)
    assert "<iframe" in frame.data and "report first" in frame.data
    # Its script runs, and is of another origin than the page around it.
    assert re.findall('sandbox="(.*?)"', frame.data) == ["allow-scripts"]
    (finished.path / "report.html").unlink()
    assert session.show_report(finished.path) == "no report yet: notebook 06 makes it"


def test_the_module_imports_before_the_stack_is_installed():
    code = (
        "import sys; import medcot_utils.series.kaggle.session, medcot_utils.series.notebook; "
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names))))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) <= {"__main__", "medcot_utils"}
