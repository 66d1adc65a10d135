"""What `medcot status` shows, and `medcot run` at its end: the README's rows, and a mark on what is stale."""

from __future__ import annotations

import json
import re
from pathlib import Path

import made_up_measures
import pytest
from made_up_runs import MORE, fill_more, retrain
from typer.testing import CliRunner

from medcot_utils.cli import main
from medcot_utils.cli.runs import next_steps
from medcot_utils.config import load_config
from medcot_utils.evaluation import merged_column
from medcot_utils.evaluation.headline import HEADLINE, headline_rows
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series.results_text import write_parts


@pytest.fixture
def status(monkeypatch):
    """`status(run)`: what the command prints."""
    monkeypatch.setattr(main.console, "width", 200)
    return lambda run, *options: CliRunner().invoke(main.app, ["status", str(run.path), *options]).stdout


def test_the_final_table_has_the_rows_of_the_readme(tmp_path, status):
    run = fill_more(Run.create(tmp_path / "run", MORE))
    run.record_step("06_comparison", state="done")
    labels = [row.label for row in headline_rows(run.read("metrics"))]
    readme = write_parts(made_up_measures.demo(), set())["table"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in readme.splitlines()[2:]] == labels
    assert len(labels) == len(HEADLINE) and labels[-1] == "multiple choice by likelihood (share), 60 questions, chance 0.25"
    assert "multiple choice by letter (share), 60 questions, chance 0.25" in labels
    shown = " ".join(status(run).partition("before and after")[2].split())
    assert shown.startswith("; brackets: 95 % intervals ")
    places = [shown.index(" ".join(label.split()[:4])) for label in labels]
    assert places == sorted(places) and len(set(places)) == len(HEADLINE)


def test_status_marks_what_an_earlier_training_left(tmp_path, status):
    run = fill_more(Run.create(tmp_path / "run", MORE))
    for name in ("report", "model_card"):
        run.write(name, "as it was made")
    run.record_step("06_comparison", state="done")
    assert "stale" not in status(run)
    retrain(run).write("report", "as it was made")
    lines = status(run).splitlines()
    marked = [line.split(": ")[0] for line in lines if line.endswith("(stale: run notebook 07_export)")]
    assert marked == ["merged model", "model card"] and "The merged model is stale: run notebook 07_export." in lines
    changed = MORE.model_copy(update={"training": MORE.training.model_copy(update={"learning_rate": 0.1})})
    Run.create(run.path, changed)
    shown = status(run)
    assert "before and after: stale: run notebook 05_training" in shown and "held-out loss" not in shown
    assert re.search(r"^report: .* \(stale: run notebook 04_lora_config\)$", shown, re.MULTILINE)
    assert re.search(r"^adapter: .* \(stale: run notebook 05_training\)$", shown, re.MULTILINE)
    assert json.loads(status(run, "--json"))["metrics"] == {}


@pytest.mark.parametrize(
    ("needed", "settings", "said"),
    [
        (35, [], "evaluation.num_questions=35"),
        (35, ["evaluation.num_questions=36", "evaluation.merged_questions=8"], "evaluation.merged_questions=35"),
        (35, ["evaluation.merged_questions=8"], "evaluation.num_questions=35 --set evaluation.merged_questions=35"),
        (41, [], None),
        (None, [], None),
    ],
)
def test_too_few_questions_name_the_setting_for_more(needed, settings, said, tmp_path, monkeypatch):
    config = load_config("smoke", ["dataset.held_out_rows=40", "evaluation.num_questions=24", *settings])
    verdicts = [{"about": "form", "needed": needed}, {"about": "loss", "needed": 99}]
    monkeypatch.setattr(merged_column, "read_merged", lambda run: {"verdicts": verdicts})
    shown = merged_column.suggest_questions(Run.create(tmp_path / "run", config))
    call = f"as many of the 40 held-out questions as would tell: medcot run --run-dir {tmp_path / 'run'} --set {said}"
    whom = "all models" if said and "num_questions" in said else "the merged model"
    assert shown == (f"to ask {whom} {call}" if said else "")


def test_status_shows_the_setting_for_more_questions(tmp_path, status, monkeypatch):
    run = fill_more(Run.create(tmp_path / "run", MORE))
    monkeypatch.setattr(Run, "step_state", lambda run, name, deep: "done")
    monkeypatch.setattr(merged_column, "suggest_questions", lambda run: "to ask more")
    assert "to ask more" in status(run).splitlines()


@pytest.mark.parametrize(("last", "told"), [("running", False), ("done", False), ("paused", True), ("not run", True)])
def test_what_is_not_done_has_its_command_unless_it_runs(last, told):
    steps = dict.fromkeys(STEPS, "done") | {"07_export": last}
    lines = [line for line in next_steps(Path("runs/my run"), steps) if line.startswith("to run")]
    assert lines == ["to run what is not done: medcot run --run-dir 'runs/my run'"] * told
