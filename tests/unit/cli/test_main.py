"""The command: light to start, and what status, doctor, and settings say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from called import medcot, the_one_line
from made_up_runs import MORE, fill, fill_more

import medcot_utils
from medcot_utils.cli import main
from medcot_utils.cli.main import _parse_parameters
from medcot_utils.config import PROFILES, load_config, setting_names
from medcot_utils.errors import MedcotError, SeriesInterrupted, SeriesPaused
from medcot_utils.evaluation.headline import HEADLINE
from medcot_utils.machine import hardware
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series import runner

# --- starting ------------------------------------------------------------------------------------------------------


def test_the_command_line_imports_no_heavy_library():
    heavy = ["torch", "transformers", "datasets", "papermill", "matplotlib", "pandas", "numpy"]
    code = f"import sys, medcot_utils.cli.main; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.strip() == "[]"


def test_help_names_every_command_and_so_does_a_call_without_one():
    for arguments in (["--help"], ["-h"], []):
        result = medcot(*arguments)
        text = result.stdout + result.stderr
        assert all(command in text for command in ("run", "status", "doctor", "settings")), text
    assert "--from" in medcot("run", "-h").stdout and "--accelerator" in medcot("kaggle", "build", "-h").stdout


def test_the_version_is_the_packages(medcot_here):
    assert medcot_here("--version").stdout == f"medcot {medcot_utils.__version__}\n"


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "medcot_utils", "settings", "--profile", "nope"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "unknown profile 'nope'" in the_one_line(result)


ANOTHER_SYSTEM = """
import sys, psutil, pydantic.main, rich.console, typer, yaml, zoneinfo
sys.platform, sys.modules["resource"], sys.argv = {platform!r}, None, ["medcot", "status", "runs/mine"]
"""


@pytest.mark.parametrize("platform", ["win32", "darwin", "linux"])
def test_another_system_than_linux_is_one_line(platform):
    code = ANOTHER_SYSTEM.format(platform=platform) + "from medcot_utils.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    line = the_one_line(result)
    assert f"medcot needs Linux, and this is {platform}: use WSL on Windows, a Linux container on a Mac" in line


def test_a_notebook_on_another_system_says_so():
    code = ANOTHER_SYSTEM.format(platform="win32") + "from medcot_utils.series.notebook import start; start('auto')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert "InstallError: medcot needs Linux, and this is win32" in result.stderr.splitlines()[-1]


def test_a_paused_training_is_no_error(monkeypatch, capsys):
    def pause():
        raise SeriesPaused("05_training: 3 of 6 steps")

    monkeypatch.setattr(main, "app", pause)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 75 and capsys.readouterr().out == "medcot: paused. 05_training: 3 of 6 steps\n"


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def stop():
        raise SeriesInterrupted("interrupted in 05_training; the same command resumes")

    monkeypatch.setattr(main, "app", stop)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "medcot: interrupted in 05_training; the same command resumes\n"


# --- status, doctor, settings --------------------------------------------------------------------------------------


def test_status_without_a_run_names_the_first_notebook(tmp_path):
    assert "run notebook 01_setup first" in the_one_line(medcot("status", tmp_path))


def test_status_as_json_has_no_metrics_before_the_comparison(tmp_path):
    run = Run.create(tmp_path / "run", load_config("smoke"))
    run.begin("01_setup")
    run.write("machine", {"cpu_cores": 2})
    run.record_done("01_setup")
    run.record_step("02_baseline_inference", state="failed", error="ValueError: no")
    result = medcot("status", tmp_path / "run", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert set(found) == {"run_dir", "profile", "steps", "metrics", "forced", "merged", "merged_verdict"}
    assert (found["profile"], found["metrics"], found["forced"], found["merged"]) == ("smoke", {}, {}, {})
    assert [step["name"] for step in found["steps"]] == list(STEPS)
    keys = {"name", "state", "seconds", "peak_memory_mb", "peak_gpu_memory_mb", "error"}
    assert all(set(step) == keys for step in found["steps"])
    first, second, *rest = found["steps"]
    assert first["state"] == "done" and first["peak_memory_mb"] > 10 and first["error"] is None
    assert (second["state"], second["error"]) == ("failed", "ValueError: no")
    assert {step["state"] for step in rest} == {"not run"}
    shown = medcot("status", tmp_path / "run").stdout
    assert "failed: ValueError: no" in shown and "07_export" in shown
    assert "of the GPU" not in shown
    run.record_step("01_setup", peak_gpu_memory_mb={"allocated": 7700, "reserved": 8812})
    shown = medcot("status", tmp_path / "run").stdout
    assert "of the GPU" in shown and "8812 MB" in shown


@pytest.mark.parametrize("command", ["status", "report", "grade", "chat", "push", "train"])
def test_a_command_without_a_run_lists_those_that_are_here(command, medcot_here, tmp_path):
    assert "There is none in runs/" in the_one_line(medcot_here(command, cwd=tmp_path))
    for name in ("one", "two"):
        Run.create(tmp_path / "runs" / name, load_config("smoke"))
    (tmp_path / "runs" / "no run").mkdir()
    assert "Found in runs/: runs/one, runs/two. Give one" in the_one_line(medcot_here(command, cwd=tmp_path))


def test_a_command_without_a_run_takes_the_only_one(medcot_here, tmp_path):
    Run.create(tmp_path / "runs" / "one", load_config("smoke"))
    result = medcot_here("status", "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["run_dir"] == "runs/one"
    assert result.stderr == "run directory: runs/one, the only run in runs/\n"


def test_a_compared_run_says_how_to_keep_and_compare_it(medcot_here, tmp_path):
    for name in ("first", "other", "mine"):
        run = fill(Run.create(tmp_path / "runs" / name, load_config("smoke")))
        run.write("report", "as it was made")
        run.record_step("06_comparison", state="done")
    os.utime(tmp_path / "runs" / "other" / "metrics.json", (0, 0))
    shown = medcot_here("status", "runs/mine", cwd=tmp_path).stdout.splitlines()
    assert "to compare this run with runs/first: medcot report runs/first runs/mine --out runs/first-and-mine.html" in shown
    assert shown[-3] == "to run what is not done: medcot run --run-dir runs/mine"
    assert shown[-1] == "to keep this result, copy it before you change a setting: cp -r runs/mine runs/mine-first"
    config = tmp_path / "runs" / "mine" / "config.json"
    config.write_text(config.read_text().replace('"repo_id": null', '"repo_id": "x/y"'))  # as somebody else's run has it
    result = medcot_here("status", "runs/first", cwd=tmp_path)
    shown = result.stdout
    assert "mine/config.json" not in result.stderr
    assert "with runs/mine: medcot report runs/first runs/mine --out runs/first-and-mine.html" in shown, "the older one first"
    other = Run.open(tmp_path / "runs" / "first")
    other.write("questions", other.read("questions")[1:])
    assert "to compare this run with runs/other" in medcot_here("status", "runs/mine", cwd=tmp_path).stdout, "asked the same"
    changed = load_config("smoke", ["evaluation.confidence_level=0.9"])
    Run.create(tmp_path / "runs" / "other", changed)
    assert "to compare" not in medcot_here("status", "runs/mine", cwd=tmp_path).stdout, "its comparison is stale"
    Run.create(tmp_path / "runs" / "other", load_config("smoke"))
    assert "to compare" in medcot_here("status", "runs/mine", cwd=tmp_path).stdout
    link = tmp_path / "runs" / "other" / "link"
    link.symlink_to(tmp_path)
    shown = medcot_here("status", "runs/mine", cwd=tmp_path)
    assert "to compare" not in shown.stdout and shown.returncode == 0, "a run beside it that cannot be read"
    link.unlink()
    Run.open(tmp_path / "runs" / "other").record_step("06_comparison", state="running")
    assert "to compare" not in medcot_here("status", "runs/mine", cwd=tmp_path).stdout, "it is being redone"
    shown = medcot_here("status", "runs/other", cwd=tmp_path).stdout
    assert "to keep" not in shown and "to compare" not in shown
    (tmp_path / "runs" / "mine").rename(tmp_path / "runs" / "first-first")
    assert not any("cp -r" in line for line in medcot_here("status", "runs/first", cwd=tmp_path).stdout.splitlines())


def test_the_help_of_run_names_every_notebook_parameter():
    folder, own = runner.notebooks_dir(), {"RUN_DIR", "PROFILE", "OVERRIDES"}  # those have options
    names = set().union(*(runner.parameters_of(folder / f"{step}.ipynb") for step in STEPS)) - own
    assert names and set(re.findall(r"[A-Z_]{4,}", main.PARAMETERS)) == names


@pytest.mark.parametrize("left", [(), ("chrf", "rouge_l")], ids=["none", "two"])
def test_status_shows_the_headline_metrics_that_there_are(tmp_path, medcot_here, left):
    run = fill(Run.create(tmp_path / "run", load_config("smoke")))
    measured = run.read("metrics")
    run.write("metrics", measured | {"metrics": {name: measured["metrics"][name] for name in left}})
    run.write("report", "<html>")
    run.record_step("06_comparison", state="done")
    table, stored = medcot_here("status", run.path), medcot_here("status", run.path, "--json")
    assert table.returncode == stored.returncode == 0, table.stderr
    assert list(json.loads(stored.stdout)["metrics"]) == sorted(left, reverse=True)
    assert ("before and after: no headline metric was measured" in table.stdout) is (not left)
    assert ("chrF of the answer" in table.stdout) is bool(left)


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "not yet"])
def test_status_has_a_column_for_the_merged_model(tmp_path, medcot_here, monkeypatch, measured):
    run = fill_more(Run.create(tmp_path / "run", MORE), merged=measured)
    run.write("report", "<html>")
    run.record_step("06_comparison", state="done")
    monkeypatch.setattr(main.console, "width", 80)
    table, stored = medcot_here("status", run.path), json.loads(medcot_here("status", run.path, "--json").stdout)
    lines = [line for line in table.stdout.splitlines() if str(run.path) not in line and "Does the merged" not in line]
    assert max(map(len, lines)) <= 80
    assert ("merged" in table.stdout.partition("before and after")[2][:500]) is measured
    expected = "Does the merged model behave as measured? Form: no" if measured else "Merged model: see notebook 07."
    assert expected in table.stdout and stored["merged_verdict"].startswith(expected)
    assert list(stored["merged"]) == (list(HEADLINE[:5]) if measured else [])
    assert list(stored["forced"]) == ["rouge_l", "chrf"]
    assert "[0.54, 0.88]" in table.stdout or not measured, "an interval does not break"
    assert "forced" in table.stdout, "and the label breaks"


@pytest.mark.embedded
def test_doctor_says_of_every_profile_whether_it_can_run_here(tmp_path):
    result = medcot("doctor", "--run-dir", tmp_path / "run")
    assert (result.returncode, result.stderr) == (0, "")
    lines = {profile: next(line for line in result.stdout.splitlines() if profile in line) for profile in PROFILES}
    assert all(" yes " in line or " no " in line for line in lines.values())
    assert " no " in lines["article"] and "no CUDA GPU is visible" in lines["article"]
    assert " 6 GiB " in lines["small"] and "GiB" in lines["article"].partition(" no ")[2]
    assert "as article" in lines["full"], "what several profiles lack is written once"
    assert "to run smoke: medcot run --profile smoke" in result.stdout and "--profile article" not in result.stdout
    assert not (tmp_path / "run").exists(), "looking changes nothing"
    times = " ".join(result.stdout.split()).partition("CPU cores: by a probe of this machine")[2]
    assert "smoke" in times and "article" not in times and all(step in times for step in (*STEPS, "all seven"))


def test_settings_lists_every_setting_with_its_value():
    result = medcot("settings", "--profile", "smoke")
    assert result.returncode == 0
    line = next(line for line in result.stdout.splitlines() if "training.learning_rate" in line)
    assert "0.002" in line
    assert [name for name in setting_names() if name != "profile" and name not in result.stdout] == []


def test_a_tilde_after_the_equals_sign_is_the_home_folder(medcot_here, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Run.create(tmp_path / "run", load_config("smoke"))
    assert "profile smoke" in medcot_here("status", "~/run").stdout
    line = the_one_line(medcot_here("run", "--profile", "demo", "--run-dir=~/run"))
    assert f"run directory {tmp_path / 'run'} holds a run of profile 'smoke'" in line


@pytest.mark.parametrize("name", ["[/b] [red]x", ":cat: {1}"])
def test_names_and_errors_are_shown_as_they_are_written(name, medcot_here, tmp_path):
    run = Run.create(tmp_path / name, load_config("smoke"))
    run.record_step("02_baseline_inference", state="failed", error=f"ValueError: {name} [/INST]")
    shown = medcot_here("status", run.path).stdout
    assert f"failed: ValueError: {name} [/INST]" in shown
    assert f"run directory {run.path} holds" in the_one_line(medcot_here("run", "--profile", "demo", "--run-dir", run.path))


# --- parameters ----------------------------------------------------------------------------------------------------


def test_parameters_are_read_as_numbers_lists_and_texts():
    pairs = ["SHOW=5", "QUESTION=Why = so?", "FLAG=true"]
    assert _parse_parameters(pairs) == {"SHOW": 5, "QUESTION": "Why = so?", "FLAG": True}
    with pytest.raises(MedcotError, match="use --run-dir, --profile or --set"):
        _parse_parameters(["OVERRIDES=[]"])


@pytest.mark.parametrize(
    "question", ["Why? case #2: fever", "# of days?", "[a] or {b}?", "42", "1e5", "null and void", "*", "yes", "'tis", "a: b"]
)
def test_a_question_is_asked_as_it_is_written(question):
    assert _parse_parameters([f"QUESTION={question}"]) == {"QUESTION": question}


@pytest.mark.parametrize("value", ["many", "2.5", "", "[1]"])
def test_a_parameter_of_another_type_than_its_default_is_refused(value):
    with pytest.raises(MedcotError, match=r"--parameter SHOW: .*expected a whole number, as in SHOW=3"):
        _parse_parameters([f"SHOW={value}"])


# --- train, settings auto ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "settings"), [([], []), (["--nproc", "4"], ["training.num_processes=4"])])
def test_train_keeps_the_stored_processes_unless_it_is_told(given, settings, medcot_here, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(main, "_run_notebooks", lambda folder, profile, settings, *rest: asked.extend(settings))
    Run.create(tmp_path / "run", load_config("smoke", ["training.num_processes=2"]))
    assert medcot_here("train", tmp_path / "run", *given).returncode == 0
    assert asked == settings


def test_settings_of_auto_are_those_of_the_profile_it_means(medcot_here, monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", list)
    said = medcot_here("settings", "--profile", "auto", "training").stdout
    assert "profile demo: no CUDA GPU is visible" in said and "value in demo" in said


def test_auto_is_not_among_the_profiles_that_replace_it():
    with pytest.raises(
        MedcotError, match=r"unknown profile 'auto': expected one of smoke, demo, small, article, recommended, full$"
    ):
        load_config("auto")
