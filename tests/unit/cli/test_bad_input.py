"""Bad input to the command: one line on stderr, exit code 1, and no traceback, before anything is made."""

from __future__ import annotations

import json

import pytest
from called import medcot, the_one_line

from medcot_utils.cli import main
from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError, SeriesInterrupted
from medcot_utils.run.directory import Run

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


def test_a_notebook_before_its_predecessor_names_the_one_to_run(tmp_path):
    line = the_one_line(medcot("run", "--profile", "smoke", "--run-dir", tmp_path / "run", "--from", "5"))
    assert "05_training cannot begin: held_out_rows.parquet is not in run/ yet: run notebook 03_dataset_prep first" in line
    assert line.endswith(f". This runs all that is not done: medcot run --run-dir {tmp_path}/run")
    assert not (tmp_path / "run" / "notebooks").exists(), "no kernel starts to say so"
