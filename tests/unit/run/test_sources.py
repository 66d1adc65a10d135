"""What a result is made from beside settings and artifacts: edited files and replaced weights make it stale."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest

from medcot_utils.config import load_config
from medcot_utils.run import sources
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.store import MANIFEST

MCQ = {"base_mcq", "tuned_mcq"}
OF_MODEL = {name for name, artifact in ARTIFACTS.items() if artifact.reads_model}


def stale(run):
    return {name for name in ARTIFACTS if not run.is_fresh(name)}


def as_recorded_before(run):
    """The run as a version left it that recorded artifacts and data file alone."""
    manifest = json.loads((run.path / MANIFEST).read_text())
    for name, entry in manifest["artifacts"].items():
        entry["inputs"] = {key: value for key, value in entry["inputs"].items() if key in ARTIFACTS or key == "data file"}
        del entry["settings"], entry["commits"]
        entry["fingerprint"] = run.fingerprint(name, entry["inputs"])
    (run.path / MANIFEST).write_text(json.dumps(manifest))
    return run


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "a"}\n')
    return file


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_edited_questions_make_their_answers_stale(run_factory, write_all, questions):
    override = f"evaluation.mcq_tasks=[{questions}]"
    run = write_all(run_factory(override))
    questions.touch()
    assert stale(run) == set(), "content counts, not time"
    questions.write_text('{"question": "another"}\n')
    assert stale(run) == MCQ
    assert run.input_digests(ARTIFACTS["base_mcq"]).keys() == {f"questions of {questions}"}


def test_a_file_edited_while_its_step_works_makes_it_stale(run_factory, questions):
    run = run_factory(f"evaluation.mcq_tasks=[{questions}]")
    run.begin("02_baseline_inference")
    questions.write_text("edited")  # after it was read
    run.write("base_mcq", [])
    run.record_done("02_baseline_inference")
    assert not run.is_fresh("base_mcq")
    run.begin("02_baseline_inference")
    run.write("base_mcq", [])
    assert run.is_fresh("base_mcq")


def test_other_shipped_questions_make_their_answers_stale(run_factory, write_all, questions, monkeypatch):
    run = write_all(run_factory())
    monkeypatch.setattr(sources, "SHIPPED_MCQ", questions)
    assert stale(run) == MCQ


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_changed_file_of_a_local_model_makes_all_stale(run_factory, write_all, model, file):
    run = write_all(run_factory(f"model.name={model}"))
    (model / "README.md").write_text("said, not computed")
    (model / "checkpoint-3").mkdir()
    (model / "checkpoint-3" / "model.safetensors").write_bytes(b"below")
    (model / "model.safetensors").touch()
    assert stale(run) == set()
    (model / file).write_bytes(b"other")
    assert stale(run) == OF_MODEL >= {"base_answers", "plan", "adapter", "merged", "held_out_loss"}


def test_large_weights_count_by_size_and_time(run_factory, write_all, model, monkeypatch):
    monkeypatch.setattr(sources, "_MOST_BYTES", 4)
    monkeypatch.setattr(sources, "_sha256_once", lambda file, *found: Path(file).read_bytes().hex() if found[0] <= 4 else 1 / 0)
    run = write_all(run_factory(f"model.name={model}"))
    assert stale(run) == set()
    os.utime(model / "model.safetensors", (1, 1))
    assert stale(run) == OF_MODEL


def test_another_embedding_model_makes_the_metrics_stale(run_factory, write_all, model):
    run = write_all(run_factory(f"evaluation.embedding_model={model}"))
    (model / "model.safetensors").write_bytes(b"other")
    assert stale(run) == {"metrics", "merged_metrics"}


def test_records_without_files_of_the_model_stay_done(run_factory, write_all, model, questions):
    overrides = f"model.name={model}", f"evaluation.mcq_tasks=[{questions}]"
    run = as_recorded_before(write_all(run_factory(*overrides)))
    assert stale(run) == set()
    (model / "model.safetensors").write_bytes(b"other")
    questions.write_text("{}")
    assert stale(run) == set(), "nobody can tell what they were made from"
    run.write("base_mcq", [])
    assert f"questions of {questions}" in run.manifest()["artifacts"]["base_mcq"]["inputs"]


def test_training_begun_by_an_earlier_version_is_resumed(run_factory, write_all, model):
    run = write_all(run_factory(f"model.name={model}"))
    name = run.fingerprint("adapter", {})[:12]
    assert run.checkpoint_dir("adapter").name != name
    run.checkpoint_dir("adapter").rmdir()
    (run.path / "checkpoints" / name).mkdir()
    assert run.checkpoint_dir("adapter").name == name


def test_a_run_copied_away_from_its_model_stays_done(run_factory, write_all, model):
    run = write_all(run_factory(f"model.name={model}"))
    model.rename(model.with_name("elsewhere"))
    assert stale(run) == set()


def test_the_name_of_a_task_is_not_followed_out_of_its_folder(tmp_path):
    (tmp_path / "task.yaml").write_text("{}")  # read as a task's file, it lacks everything
    outside = os.path.relpath(tmp_path / "task", sources._MCQ_TASKS)
    config = load_config("smoke", [f"evaluation.mcq_tasks=[{outside}]"])
    assert sources.find_hub_commits(ARTIFACTS["base_mcq"], config) == {}


def test_the_commit_of_an_unpinned_name_is_recorded(run_factory, write_all, tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = {
        "models--a--model": "1",
        "datasets--a--rows": "2",
        "datasets--GBaker--MedQA-USMLE-4-options-hf": "3",
        "models--a--e": "4",
    }
    for folder, digit in cached.items():
        (tmp_path / folder / "refs").mkdir(parents=True)
        (tmp_path / folder / "refs" / "main").write_text(digit * 40)
    others = "evaluation.mcq_tasks=[medqa, shipped]", "evaluation.embedding_model=a/e"
    run = write_all(run_factory("model.name=a/model", "dataset.name=a/rows", *others))
    unpinned = {name: entry["commits"] for name, entry in run.manifest()["artifacts"].items()}
    assert unpinned["adapter"] == {"model.name": "1" * 40}
    assert unpinned["questions"] == {"model.name": "1" * 40, "dataset.name": "2" * 40}
    assert unpinned["base_mcq"] == {"model.name": "1" * 40, "evaluation.mcq_tasks medqa": "3" * 40}
    assert unpinned["metrics"] == {"evaluation.embedding_model": "4" * 40}
    used = sources.with_commits_used(run.config, run.manifest())
    assert (used.model.revision, used.dataset.revision, run.config.model.revision) == ("1" * 40, "2" * 40, None)
    capsys.readouterr()
    (tmp_path / "models--a--model" / "refs" / "main").write_text("5" * 40)
    run.write("adapter", content("adapter"))
    said = f"model.name is not pinned, and has changed at the Hub: {'5' * 12} now, {'1' * 12} when other parts"
    assert said in capsys.readouterr().out
    assert not stale(run), "said, not done again: most commits change a README"
    pinned = write_all(run_factory("model.name=a/model", "model.revision=abc", name="pinned")).manifest()["artifacts"]
    assert pinned["adapter"]["commits"] == {}
