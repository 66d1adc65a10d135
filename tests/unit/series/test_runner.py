"""The series without its notebooks: what a call says it changes, what it refuses, and what a refusal or Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import re

import nbformat
import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError, SeriesInterrupted, SeriesPaused
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.store import CONFIG
from medcot_utils.series import runner
from medcot_utils.series.runner import SeriesError, plan_config, run_series

FIRST, TRAINING = "01_setup", "05_training"


@pytest.fixture
def done(run_factory, write_all):
    """A finished run, with artifacts that were made up."""
    run = write_all(run_factory())
    for step in STEPS:
        run.record_step(step, state="done", seconds=1.0, peak_memory_mb=1)
    return run


ROWS = {"rows_read": 3, "dropped": {"duplicate question": 1}, "repeats": [], "repeats_dropped": True, "overlong_dropped": 0}
ROWS |= {"checks": {"rows": 1}, "held_out": 1, "held_out_overlong": 0}  # of notebook 03's report


@pytest.fixture
def notebooks(monkeypatch, content):
    """Notebooks that write made-up content; `notebooks[step]` is what another one does instead. `.ran` are their names."""

    class Notebooks(dict):
        def __init__(self):
            super().__init__()
            self.ran = []

        def run(self, run, notebook, given, report, say, show):
            self.ran.append(notebook.stem)
            report(notebook.stem, 1, 20)
            if notebook.stem in self:
                return self[notebook.stem](run, report)
            for name in run.makes(notebook.stem):
                run.write(name, content(name) | ROWS if name == "data_report" else content(name))
            run.record_step(notebook.stem, state="done", seconds=1.0, peak_memory_mb=1)

    made = Notebooks()
    monkeypatch.setattr(runner, "_run_notebook", made.run)
    return made


def refuse(run, report):
    run.record_step(FIRST, state="failed", error="HubError: no")
    raise SeriesError(f"notebook {FIRST} failed: HubError: no")


# --- a refused call changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_a_call_beside_another_one_changes_nothing(done, work_elsewhere, notebooks, force):
    work_elsewhere(done.path)
    before = {name: (done.path / name).read_bytes() for name in ("config.json", "manifest.json")}
    changed = load_config("smoke", ["training.max_steps=3"])
    for call in (
        lambda: run_series(done.path, changed, force=force),
        lambda: plan_config(done.path, None, ["training.max_steps=3"]),
        lambda: plan_config(done.path, "smoke", []),
    ):
        with pytest.raises(MedcotError, match=r"another medcot run is working in run/"):
            call()
    assert {name: (done.path / name).read_bytes() for name in before} == before and notebooks.ran == []


def test_settings_that_notebook_01_refuses_are_not_kept(done, notebooks):
    notebooks[FIRST] = refuse
    before = (done.path / CONFIG).read_bytes()
    with pytest.raises(SeriesError, match="HubError"):
        run_series(done.path, load_config("smoke", ["hub.repo_id=ann/cot"]))
    assert (done.path / CONFIG).read_bytes() == before
    del notebooks[FIRST]
    said = []
    run_series(done.path, plan_config(done.path, None, [])[0], say=said.append)
    assert notebooks.ran == [FIRST, FIRST], "the next call is not refused for them again"


def test_a_first_call_that_is_refused_leaves_no_settings(tmp_path, notebooks):
    notebooks[FIRST] = refuse
    with pytest.raises(SeriesError):
        run_series(tmp_path / "run", load_config("smoke", ["hub.repo_id=ann/cot"]))
    assert not (tmp_path / "run" / CONFIG).exists()
    del notebooks[FIRST]
    run_series(tmp_path / "run", load_config("smoke"))
    assert Run.open(tmp_path / "run").config == load_config("smoke")


def test_settings_stay_if_a_later_notebook_fails(done, notebooks):
    def fail(run, report):
        run.record_step(TRAINING, state="failed", error="no")
        raise SeriesError("no")

    notebooks[TRAINING] = fail
    with pytest.raises(SeriesError):
        run_series(done.path, load_config("smoke", ["training.max_steps=3"]))
    assert Run.open(done.path).config.training.max_steps == 3


def test_force_keeps_a_training_whose_step_cannot_begin(done, notebooks, content):
    (done.checkpoint_dir("adapter") / "checkpoint-6").mkdir()
    (done.path / "train_rows.parquet").unlink()
    with pytest.raises(
        SeriesError, match=r"^notebook 05_training cannot begin: train_rows\.parquet is missing .* run notebook 03"
    ):
        run_series(done.path, done.config, first=5, last=5, force=True)
    assert "adapter" in done.manifest()["artifacts"] and list(done.path.glob("checkpoints/*/checkpoint-6"))
    assert notebooks.ran == [], "no kernel starts to say so"


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("[medqa, nowhere.jsonl]", "nowhere.jsonl: no such file"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("[shipped, own.json]", "unknown multiple-choice task 'own.json'"),
    ],
)
def test_a_bad_file_of_questions_is_refused_before_it_is_kept(tmp_path, tasks, said):
    with pytest.raises(MedcotError, match=said):
        plan_config(tmp_path / "run", "smoke", [f"evaluation.mcq_tasks={tasks}"])


# --- time that runs out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_a_spent_session_begins_one_notebook_after_01(run_factory, notebooks, force):
    run = run_factory("training.max_hours=0.000001")
    with pytest.raises(SeriesPaused, match=r"^03_dataset_prep does not begin, because training\.max_hours is nearly over"):
        run_series(run.path, run.config, force=force)
    assert notebooks.ran == [FIRST, "02_baseline_inference"]


def test_spent_sessions_go_on_one_notebook_at_a_time(run_factory, notebooks):
    run, paused = run_factory("training.max_hours=0.000001"), 0
    while run.step_state("07_export") != "done":
        try:
            run_series(run.path, run.config)
        except SeriesPaused:
            paused += 1
    assert notebooks.ran == list(STEPS) and paused == 5


# --- what it says ------------------------------------------------------------------------------------------------------


def call(run, profile, *overrides, **more):
    """The lines on profile and changed settings that a call says."""
    config, line = plan_config(run.path, profile, overrides)
    said = line.split("\n")
    run_series(run.path, config, say=said.append, **more)
    return [line for line in said if line.startswith(("profile", "changed"))]


def test_the_plan_names_the_run_from_the_working_folder_on(run_factory, notebooks, monkeypatch):
    run = run_factory()
    monkeypatch.chdir(run.path.parent.parent)
    assert call(run, None) == [f"profile smoke: as in {run.path.parent.name}/run"]


def test_every_setting_that_a_call_changes_is_said(run_factory, notebooks):
    run = run_factory("training.learning_rate=0.1", "evaluation.num_questions=3")
    assert call(run, None) == ["profile smoke: as in run"]
    assert call(run, None, "training.max_steps=4", last=1) == ["profile smoke: as in run", "changed: training.max_steps 6 -> 4"]
    assert call(run, None, "training.max_steps=5", first=4) == ["profile smoke: as in run", "changed: training.max_steps 4 -> 5"]
    assert call(run, "smoke", "training.max_steps=4") == [
        "profile smoke: as asked",
        "changed: training.max_steps 5 -> 4",
        "changed: training.learning_rate 0.1 -> 0.002",
        "changed: evaluation.num_questions 3 -> 6",
    ]


def test_a_refused_call_says_no_changed_setting(done, notebooks):
    notebooks[FIRST], said = refuse, []
    with pytest.raises(SeriesError, match="HubError"):
        run_series(done.path, load_config("smoke", ["hub.repo_id=ann/cot"]), say=said.append)
    with pytest.raises(MedcotError, match=r"holds a run of dataset\.path"):
        run_series(done.path, load_config("smoke", ["dataset.path=rows.jsonl"]), say=said.append)
    assert not any("changed:" in line for line in said)


def test_a_run_that_cannot_be_read_has_nothing_to_change(run_factory, notebooks):
    run = run_factory()
    (run.path / CONFIG).write_text("{")
    assert call(run, "smoke", force=True) == ["profile smoke: as asked"]


def test_a_step_done_again_says_why(done, notebooks):
    said = []
    run_series(done.path, load_config("smoke", ["generation.max_new_tokens=20"]), say=said.append)
    again = [line for line in said if "redone" in line]
    assert f"{FIRST}: redone, because generation.max_new_tokens 24 -> 20" in again
    assert "02_baseline_inference: redone, because generation.max_new_tokens 24 -> 20" in again
    assert "06_comparison: redone, because generation.max_new_tokens 24 -> 20" in again
    assert "07_export: redone, because generation.max_new_tokens 24 -> 20" in again, "the merged model answers anew"
    assert notebooks.ran == [FIRST, "02_baseline_inference", "06_comparison", "07_export"]


def test_after_notebook_03_every_row_is_accounted_for(run_factory, notebooks):
    run, said = run_factory(), []
    run_series(run.path, run.config, say=said.append)
    line = "03_dataset_prep: trains on 1 of 3 rows (12 asked for with dataset.num_rows)"
    assert f"{line}; 1 left out (duplicate question); 1 held out (dataset.held_out_rows is 40)" in said


def test_each_notebook_says_how_long_it_should_take(run_factory, notebooks):
    run, said = run_factory(), []
    estimate = {step: {"seconds": 240.0, "low": 180.0, "high": 330.0} for step in STEPS}

    def look(run, report):
        run.write("machine", {"estimate": estimate})
        run.record_step(FIRST, state="done", seconds=1.0, peak_memory_mb=1)

    notebooks[FIRST] = look
    run_series(run.path, run.config, say=said.append)
    total, *lines = [line for line in said if "until" in line]
    assert total.startswith("6 notebooks to run: 24 min (18 to 33), until about ")
    assert [line.partition(": 4 min (3 to 6), until about ")[0] for line in lines] == list(STEPS)[1:]
    assert re.fullmatch(r"7 notebooks run in \d+ s", said[-1])
    said.clear()
    run_series(run.path, load_config("smoke", ["training.max_steps=3"]), say=said.append)
    assert any(line.startswith("up to 4 notebooks to run: 16 min (12 to 22)") for line in said), "06 and 07 read what 05 makes"


@pytest.mark.parametrize("value", ["hf_" + "aB" * 17, "of somebody special"])
def test_a_parameter_that_holds_a_secret_is_refused(value, done, notebooks, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "somebody special")
    before = (done.path / "manifest.json").read_bytes()
    with pytest.raises(
        SeriesError, match=r"^--parameter QUESTION holds (a secret of this machine|what looks like a Hugg)"
    ) as caught:
        run_series(done.path, done.config, parameters={"QUESTION": value})
    assert value[-16:] not in str(caught.value)
    assert notebooks.ran == [] and (done.path / "manifest.json").read_bytes() == before


def test_a_parameter_that_does_a_step_again_is_named(done, notebooks):
    said = []
    run_series(done.path, done.config, parameters={"QUESTION": "Why?"}, say=said.append)
    assert "02_baseline_inference: redone, because QUESTION is given" in said
    assert notebooks.ran == ["02_baseline_inference"]


def test_many_reasons_are_counted(done, notebooks):
    names = ("max_steps=3", "learning_rate=1", "warmup_steps=2", "weight_decay=1", "logging_steps=3", "optim=sgd", "save_steps=9")
    said = []
    run_series(done.path, load_config("smoke", [f"training.{name}" for name in names]), say=said.append)
    line = next(line for line in said if line.startswith(f"{TRAINING}: redone"))
    assert line.endswith(", and 2 more") and line.count(" -> ") == 5


# --- a working folder that is somebody else's ------------------------------------------------------------------------------

CELL = """
import importlib.util, subprocess, sys
subprocess.run([sys.executable, "-c", "import planted"], capture_output=True)
if importlib.util.find_spec("planted"):
    import planted
"""


def test_modules_in_the_working_folder_are_not_loaded(tmp_path, monkeypatch, smoke_config):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    for step in STEPS:
        nbformat.write(notebook, tmp_path / f"{step}.ipynb")
    monkeypatch.setenv("MEDCOT_NOTEBOOKS", str(tmp_path))
    data = tmp_path / "data"
    data.mkdir()
    (data / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(data)
    with pytest.raises(SeriesError, match="01_setup ended without recording its results"):
        run_series(data / "run", smoke_config, last=1)
    assert not (tmp_path / "ran").exists() and os.environ["MEDCOT_HOME"] == str(HOME)


def test_notebooks_in_the_working_folder_are_not_run(tmp_path, monkeypatch):
    for step in STEPS:
        (tmp_path / f"{step}.ipynb").write_text("{}")
    monkeypatch.setattr(runner, "HOME", tmp_path / "nowhere")
    monkeypatch.setattr(runner, "PACKAGE", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SeriesError, match="the notebooks are not beside the package or in it"):
        runner.notebooks_dir()


# --- Ctrl-C --------------------------------------------------------------------------------------------------------------


WHOLE = "".join(json.dumps({"step": step, "max_steps": 90}) + "\n" for step in (13, 14))


@pytest.mark.parametrize(
    ("progress", "where"),
    [(WHOLE + '{"st', ", at step 14 of 90"), ("", ""), ('{"step": 1', ""), ("x\n", "")],
    ids=["half a line after it", "empty", "half a line", "no JSON"],
)
def test_ctrl_c_names_the_step_of_the_training(done, notebooks, progress, where):
    def stop(run, report):
        run.record_step(TRAINING, state="running", started=0.0, pid=1)
        (run.checkpoint_dir("adapter") / "progress.jsonl").write_text(progress)
        report(TRAINING, 12, 23)
        raise KeyboardInterrupt

    notebooks[TRAINING] = stop
    with pytest.raises(SeriesInterrupted) as caught:
        run_series(done.path, load_config("smoke", ["lora.r=8"]))
    assert str(caught.value) == f"interrupted in 05_training, cell 12 of 23{where}; the same command resumes"


def test_ctrl_c_elsewhere_names_notebook_and_cell(done, notebooks):
    def stop(run, report):
        report("06_comparison", 9, 30)
        raise KeyboardInterrupt

    notebooks["06_comparison"] = stop
    with pytest.raises(SeriesInterrupted, match=r"^interrupted in 06_comparison, cell 9 of 30; the same command resumes$"):
        run_series(done.path, load_config("smoke", ["evaluation.n_resamples=600"]))
