"""The command: light to start, and for bad input one line on stderr, exit code 1 and no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
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

MEDCOT = Path(sys.executable).with_name("medcot")


def medcot(*arguments, cwd=None):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [str(MEDCOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


@pytest.fixture
def medcot_here(monkeypatch, capfd):
    """`medcot_here("run", …)`: the command as its entry point runs it, in this process, which has its libraries by now."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(main.console, "width", 200)

    def call(*arguments, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["medcot", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        said = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, ended.value.code or 0, said.out, said.err)

    return call


def the_one_line(result):
    """The line on stderr, after checking that it is the only one and that the command ended as it should."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert len(lines) == 1 and lines[0].startswith("medcot: "), result.stderr
    return lines[0]


# --- secrets ---------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("where", "given"),
    [
        ("--grader", ["grade", "runs/x", "--grader", TOKEN]),
        ("--grader", ["grade", "runs/x", f"--grader=Ann {TOKEN}"]),
        ("--run-dir", ["run", "--profile", "smoke", "--run-dir", f"runs/{TOKEN}"]),
        ("an argument", ["status", TOKEN]),
        ("--out", ["report", "runs/x", "--out", f"{TOKEN}.html"]),
        ("an argument", ["chat", f"-q{TOKEN}"]),
        ("--repo-id", ["push", "runs/x", "--repo-id", f"me/{TOKEN}"]),
        ("--tag", ["push", "runs/x", "--tag", TOKEN]),
        ("--id", ["kaggle", "build", "--set", "seed=3", "--id", f"me/{TOKEN}"]),
        ("--dataset", ["kaggle", "build", "--dataset", f"me/{TOKEN}"]),
        ("--run-dir", ["kaggle", "output", "--run-dir", TOKEN]),
    ],
)
def test_a_token_in_any_argument_is_refused(medcot_here, monkeypatch, tmp_path, where, given):
    monkeypatch.setattr(main, "app", lambda: pytest.fail("the command has begun"))
    line = the_one_line(medcot_here(*given, cwd=tmp_path))
    assert line.startswith(f"medcot: {where} holds what looks like a Hugging Face token. Remove it") and TOKEN not in line


@pytest.mark.parametrize("option", ["--set", "--parameter", "-p"])
def test_a_token_in_a_setting_is_named_by_its_own_check(medcot_here, tmp_path, option):
    line = the_one_line(medcot_here("run", "--run-dir", "runs/x", option, f"QUESTION={TOKEN}", cwd=tmp_path))
    assert "holds what looks like a Hugging Face token. Settings are stored" in line and TOKEN not in line


def test_a_secret_of_this_machine_in_an_argument_is_refused(medcot_here, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "not-like-a-token-at-all")
    line = the_one_line(medcot_here("grade", "runs/x", "--grader", "not-like-a-token-at-all", cwd=tmp_path))
    assert "--grader holds a secret of this machine (environment WANDB_API_KEY)" in line


def test_a_run_directory_of_a_tokens_name_is_not_made(tmp_path):
    with pytest.raises(MedcotError, match=r"run directory .* holds what looks like a Hugging Face token"):
        Run.create(tmp_path / TOKEN, load_config("smoke"))
    assert list(tmp_path.iterdir()) == []


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


# --- bad input -----------------------------------------------------------------------------------------------------


# These in a process of their own, with what importing prints; the others after the same imports.
IN_A_PROCESS = ("unknown profile", "unknown setting", "article without a GPU", "missing", "unusable rows")
BAD_ARGUMENTS = {
    "unknown profile": (
        ["--profile", "smoek"],
        ["unknown profile 'smoek'", "smoke, demo, small, article", "did you mean smoke?"],
    ),
    "unknown setting": (
        ["--set", "training.max_step=3"],
        ["unknown setting 'training.max_step'", "did you mean training.max_steps?"],
    ),
    "setting by another name": (["--set", "lr=3"], ["did you mean training.learning_rate?"]),
    "setting without a value": (["--set", "training.max_steps"], ["expected NAME=VALUE"]),
    "wrong type": (["--set", "training.max_steps=many"], ["training.max_steps is 'many'", "integer"]),
    "out of range": (["--set", "training.learning_rate=-1"], ["training.learning_rate is -1", "greater than 0"]),
    "from after to": (["--from", "6", "--to", "5"], ["--from 6 is after --to 5"]),
    "article without a GPU": (["--profile", "article"], ["profile article needs a CUDA GPU", "use profile demo"]),
    "unknown parameter": (["--parameter", "QUESTON=Why?"], ["unknown notebook parameter 'QUESTON'", "QUESTION"]),
    "parameter without a value": (["--parameter", "QUESTION"], ["--parameter QUESTION: expected NAME=VALUE"]),
    "parameter that is an option": (["--parameter", "RUN_DIR=x"], ["--parameter RUN_DIR: use --run-dir"]),
    "too few held-out rows": (
        ["--set", "evaluation.num_questions=50", "--set", "dataset.name=a/b"],
        ["more than dataset.held_out"],
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line_that_says_what_to_do(case, medcot_here, tmp_path):
    arguments, expected = BAD_ARGUMENTS[case]
    profile = [] if "--profile" in arguments else ["--profile", "smoke"]
    call = medcot if case in IN_A_PROCESS else medcot_here
    line = the_one_line(call("run", *profile, "--run-dir", tmp_path / "run", *arguments))
    assert all(part in line for part in expected), line
    assert not (tmp_path / "run").exists(), "nothing is begun with a bad argument"


ROW = {"Question": "Why?", "Complex_CoT": "So.", "Response": "This."}
BAD_DATA = {
    "missing": ("rows.jsonl", None, "no such file"),
    "empty": ("rows.jsonl", "", "rows.jsonl: the file is empty"),
    "not JSON": ("rows.jsonl", json.dumps(ROW) + "\n{'Question'", "not valid jsonl (line 2"),
    "no list": ("rows.json", json.dumps(ROW), "expected a list of objects"),
    "without a column": ("rows.json", json.dumps([{"q": "Why?", "Complex_CoT": "So.", "Response": "x"}]), "no column 'Question'"),
    "without rows": ("rows.csv", "Question,Complex_CoT,Response\n", "holds no rows"),
    "unusable rows": ("rows.json", json.dumps([ROW | {"Response": " "}]), "no usable row is left of 1"),
    "too few rows": ("rows.json", json.dumps([ROW]), "lower dataset.held_out_rows"),
    "too few questions": (
        "rows.json",
        json.dumps([ROW | {"Question": f"Why {n}?"} for n in range(45)]),
        "evaluation.num_questions is",
    ),
    "of another kind": ("rows.xlsx", "x", "expected a file ending in .json, .jsonl, .csv, .parquet"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used_is_told_before_anything_runs(case, medcot_here, tmp_path):
    name, content, expected = BAD_DATA[case]
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    few = ("--set", "dataset.held_out_rows=5") if case == "too few questions" else ()
    arguments = ("--profile", "smoke", "--run-dir", "run", "--set", f"dataset.path={name}", *few)
    call = medcot if case in IN_A_PROCESS else medcot_here
    line = the_one_line(call("run", *arguments, cwd=tmp_path))
    assert name in line or "no usable row" in line or "too few" in case, line
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_written_is_named(medcot_here, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = the_one_line(medcot_here("run", "--profile", "smoke", "--run-dir", tmp_path / "file" / "run"))
    assert "cannot be written" in line and "--run-dir" in line


def test_a_folder_that_holds_something_else_is_not_taken(medcot_here, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    line = the_one_line(medcot_here("run", "--profile", "smoke", "--run-dir", tmp_path))
    assert "is not empty and is not a run" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_of_another_profile_is_not_overwritten(medcot_here, tmp_path):
    Run.create(tmp_path / "run", load_config("smoke"))
    before = (tmp_path / "run" / "config.json").read_text()
    line = the_one_line(medcot_here("run", "--profile", "demo", "--run-dir", tmp_path / "run"))
    assert "holds a run of profile 'smoke', not 'demo'" in line and "--force" in line
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize(
    "command", [["report"], ["grade"], ["push", "--repo-id", "ann/cot"], ["train", "--nproc", "2"], ["run", "--set", "lora.r=8"]]
)
def test_a_command_beside_a_run_changes_nothing(medcot_here, run_factory, write_all, work_elsewhere, command):
    run = write_all(run_factory())
    work_elsewhere(run.path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    name, *options = command
    place = ["--run-dir", run.path] if name == "run" else [run.path]
    assert "another medcot run is working in run/: wait until it ends" in the_one_line(medcot_here(name, *place, *options))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.series
def test_what_a_run_says_is_not_broken_into_lines(medcot_here, monkeypatch, tmp_path):
    # As a log without a terminal has it, where a console is 80 columns wide.
    bar = "05_training: 5.5 Training, training:  80%|████████  | 24/30 [04:04<01:06, 11.16s/step, loss=3.216], until about 13:46"

    def say_and_end(*_, say, report, show):
        say(bar)
        raise SeriesInterrupted("ended")

    monkeypatch.setattr("medcot_utils.series.runner.run_series", say_and_end)
    monkeypatch.setattr(main.console, "width", 80)
    assert bar in medcot_here("run", "--profile", "smoke", "--run-dir", tmp_path / "run").stdout.splitlines()


@pytest.mark.series
def test_a_notebook_before_its_predecessor_names_the_one_to_run(tmp_path):
    line = the_one_line(medcot("run", "--profile", "smoke", "--run-dir", tmp_path / "run", "--from", "5"))
    assert "05_training failed" in line and "run notebook 03_dataset_prep first" in line
    assert "run/notebooks/05_training.ipynb" in line and (tmp_path / "run" / "notebooks" / "05_training.ipynb").exists()


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
        run.record_step("06_comparison", state="done")
    os.utime(tmp_path / "runs" / "other" / "metrics.json", (0, 0))
    shown = medcot_here("status", "runs/mine", cwd=tmp_path).stdout.splitlines()
    assert "to compare this run with runs/first: medcot report runs/first runs/mine --out runs/first-and-mine.html" in shown
    assert shown[-1] == "to keep this result, copy it before you change a setting: cp -r runs/mine runs/mine-first"
    other = Run.open(tmp_path / "runs" / "first")
    other.write("questions", other.read("questions")[1:])
    assert "to compare this run with runs/other" in medcot_here("status", "runs/mine", cwd=tmp_path).stdout, "asked the same"
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
