"""The series from outside: where a run may lie and how it is named, without a kernel."""

from __future__ import annotations

import shutil
from pathlib import Path

import papermill
import pytest
from papermill.parameterize import parameterize_path

from medcot_utils.config import load_config
from medcot_utils.models.embedded import find_model_source
from medcot_utils.run.directory import Run
from medcot_utils.series import runner


@pytest.mark.parametrize("name", ["{1}", "{RUN_DIR}", "a{", "}b", "{{}}", "run #1"])
def test_a_run_directory_may_have_braces_in_its_name(name, tmp_path, monkeypatch):
    written = []

    def execute(notebook, executed, parameters, **kwargs):
        written.extend(parameterize_path(path, parameters) for path in (notebook, executed))

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(runner.SeriesError, match="its last cell did not run"):
        runner.run_series(tmp_path / name, load_config("smoke"), last=1)
    notebook, executed = map(Path, written)
    assert notebook.is_file() and executed.parent == tmp_path / name / "notebooks"


# --- local paths ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders, `a` with rows in it; the working one is `a`."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = "".join(f'{{"Question": "Why {n}?", "Complex_CoT": "So.", "Response": "This."}}\n' for n in range(20))
    (tmp_path / "a" / "rows.jsonl").write_text(rows)
    (tmp_path / "a" / "own.jsonl").write_text('{"question": "Which?", "options": ["x", "y"], "answer": "A"}\n')
    shutil.copytree(find_model_source("embedded:tiny-random-llama"), tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path


RELATIVE = ["dataset.path=rows.jsonl", "dataset.held_out_rows=6", "evaluation.mcq_tasks=own.jsonl", "model.name=./model"]


def test_a_run_means_the_same_from_another_folder(folders, monkeypatch):
    config, _ = runner.plan_config(folders / "run", "smoke", RELATIVE)
    Run.create(folders / "run", config)
    monkeypatch.chdir(folders / "b")
    again, _ = runner.plan_config(folders / "run", None, [])
    assert again == config == Run.open(folders / "run").config
    assert again.evaluation.mcq_tasks == (str(folders / "a" / "own.jsonl"),)
    elsewhere = [pair.replace("./", "").replace("=rows", "=../a/rows").replace("=own", "=../a/own") for pair in RELATIVE]
    elsewhere[-1] = "model.name=../a/model"
    assert runner.plan_config(folders / "run", "smoke", elsewhere)[0] == config


def test_a_notebook_by_hand_stores_absolute_paths_too(folders):
    assert Run.create(folders / "run", load_config("smoke", RELATIVE)).config.model.name == str(folders / "a" / "model")


def test_a_relative_path_of_an_earlier_version_stays_done(folders):
    run = Run.create(folders / "run", load_config("smoke", RELATIVE))
    (run.path / "config.json").write_text((run.path / "config.json").read_text().replace(str(folders / "a") + "/", ""))
    old = Run.open(run.path)
    assert (old.config.dataset.path, old.config.model.name) == ("rows.jsonl", "model")
    for profile, overrides in ((None, []), ("smoke", RELATIVE)):
        config, _ = runner.plan_config(run.path, profile, overrides)
        again = Run.create(run.path, config)
        assert again.config == old.config and again.fingerprint("machine") == old.fingerprint("machine")
