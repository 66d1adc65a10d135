"""Preflight: one line a check, or one error, before anything expensive; the same for notebook, command line and Kaggle."""

from __future__ import annotations

import json
import os
import re

import pytest

from medcot_utils.cli import doctor
from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError, PlatformError
from medcot_utils.machine import disk, hardware
from medcot_utils.machine.paths import HOME
from medcot_utils.models import embedded
from medcot_utils.series import runner
from medcot_utils.series.kaggle.build import build
from medcot_utils.series.preflight import checks, preflight

ALL = ["profile", "model", "training", "data", "questions", "answers", "tracker", "hub", "gguf", "disk"]


def names(*arguments, **keywords):
    return list(checks(*arguments, **keywords))


def test_every_check_is_one_line(tmp_path):
    made = preflight(load_config("smoke", ["evaluation.answer_tokens=12"]), tmp_path / "run")
    assert [check.name for check in made] == ALL
    assert all(check.line and "\n" not in check.line for check in made)
    lines = {check.name: check.line for check in made}
    unused = "108 of 160 usable rows are left unused (108 marked train: dataset.num_rows is 12)"
    assert lines["data"] == f"12 rows to train on, 40 held out, 6 of them to be asked; {unused}"
    assert lines["questions"] == "4 multiple-choice questions; 56 of 60 are left unused (evaluation.mcq_limit is 4)"
    assert re.fullmatch(r"answers take up to [34]\d\d of the model's 2048 tokens", lines["answers"])
    assert lines["tracker"] == "tracking: none, as set"
    assert re.fullmatch(r"\d+\.\d\d GiB needed, and there is room for it", lines["disk"])
    assert not (tmp_path / "run").exists(), "looking changes nothing"


def test_the_counts_of_rows_and_questions_reach_the_terminal(tmp_path):
    _, said = runner.plan_config(tmp_path / "run", "smoke", [])
    assert "108 of 160 usable rows are left unused" in said and "56 of 60 are left unused" in said


FAILING = {
    "profile": ("article", [], "profile article needs a CUDA GPU"),
    "model": ("smoke", ["model.name=./nowhere"], "nowhere: no such folder on this machine"),
    "training": ("smoke", ["training.optim=adamw_tourch"], "did you mean adamw_torch?"),
    "data": ("smoke", ["dataset.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "questions": ("smoke", ["evaluation.mcq_tasks=[nowhere.jsonl]"], "nowhere.jsonl"),
    "answers": ("smoke", ["evaluation.answer_tokens=2000"], "answers do not fit the model's context of 2048 tokens"),
    "tracker": ("smoke", ["tracking.backend=wandb", "tracking.mode=online"], "needs a secret for Weights & Biases"),
    "hub": ("smoke", ["hub.repo_id=ann/cot"], "needs a secret for Hugging Face"),
    "gguf": ("smoke", ["export.gguf=f16"], "llama.cpp's converter is missing"),
    "disk": ("smoke", [], "too little disk"),
}


@pytest.fixture
def failing(request, monkeypatch, tmp_path):
    """(configuration, expected error) of a run in which the one check fails."""
    profile, overrides, expected = FAILING[request.param]
    monkeypatch.setattr(hardware, "visible_gpus", list)
    if request.param == "gguf":
        find = __import__("importlib").util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if "gguf" in name else find(name, *more))
    if request.param == "disk":
        monkeypatch.setattr(disk.paths, "disk_free_gib", lambda folder: 0.01)
    return load_config(profile, overrides), expected


@pytest.mark.parametrize("failing", FAILING, indirect=True)
def test_a_check_that_fails_is_one_error(failing, tmp_path):
    config, expected = failing
    with pytest.raises(MedcotError) as caught:
        preflight(config, tmp_path / "run")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", [name for name in FAILING if name not in ("hub", "disk")], indirect=True)
def test_medcot_run_makes_the_checks_without_network(failing, tmp_path):
    config, expected = failing
    overrides = OVERRIDES[expected]
    with pytest.raises(MedcotError) as caught:
        runner.plan_config(tmp_path / "run", config.profile, overrides)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


OVERRIDES = {expected: overrides for _, overrides, expected in FAILING.values()}


def test_offline_leaves_to_notebook_01_what_asks_the_network(tmp_path):
    embedded.find_model_source("embedded:tiny-random-llama")
    forced = ["evaluation.answer_tokens=12"]
    assert names(load_config("smoke", forced), tmp_path, online=False) == [
        "profile",
        "model",
        "training",
        "data",
        "questions",
        "answers",
        "tracker",
        "gguf",
    ]
    assert names(load_config("recommended", forced), tmp_path, online=False) == ["profile", "training", "tracker", "gguf"]
    embedder = load_config("smoke", ["evaluation.embedding_model=a/b"])
    assert "questions" not in names(embedder, tmp_path, online=False) and "questions" in names(embedder, tmp_path)


def test_offline_no_embedded_model_is_made_for_a_check(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    config = load_config("smoke", ["evaluation.answer_tokens=2000"])
    assert "answers" not in names(config, tmp_path, online=False)
    preflight(config, tmp_path / "run", online=False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(MedcotError, match="answers do not fit"):
        preflight(config, tmp_path / "run")


def test_a_question_too_long_for_the_context_is_named(tmp_path):
    rows = [{"Question": f"Why {i}?", "Complex_CoT": "So.", "Response": "Yes.", "id": f"case-{i}"} for i in range(6)]
    rows[4]["Question"] = "why " * 3000
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        f"dataset.path={tmp_path}/mine.jsonl",
        "dataset.repeats=report",
        "dataset.held_out_rows=3",
        "evaluation.num_questions=3",
    ]
    with pytest.raises(
        MedcotError, match=r"2048 tokens: .*, or leave out the longest question: that of case-4, 12,000 characters$"
    ):
        checks(load_config("smoke", data), tmp_path)["answers"]()


def test_without_forced_closing_no_context_is_asked_for(tmp_path):
    assert "answers" not in names(load_config("smoke", ["evaluation.answer_tokens=null"]), tmp_path)


def test_what_a_hub_models_cache_holds_is_checked(tmp_path, monkeypatch):
    folder = embedded.find_model_source("embedded:tiny-random-llama")
    asked = []

    def cached(name, file, revision=None):
        asked.append((name, file, revision))
        return f"{folder}/{file}"

    config = load_config("smoke", ["model.name=me/llama", "model.revision=v1", "evaluation.answer_tokens=2000"])
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.try_to_load_from_cache", cached)
        with pytest.raises(MedcotError, match=r"context of 2048 tokens: the longest prompt has 3\d\d"):
            checks(config, tmp_path)["answers"]()
    assert asked == [("me/llama", "config.json", "v1")]
    assert checks(config, tmp_path)["answers"]() == "me/llama: its context length is not known until it is downloaded"


def test_for_another_machine_only_shipped_files_are_checked():
    assert names(load_config("smoke"), None, online=False) == ["data", "questions"]
    there = ["dataset.path=/kaggle/input/a/rows.jsonl", "evaluation.mcq_tasks=[/kaggle/input/a/mcq.jsonl]"]
    assert names(load_config("smoke", there), None, online=False) == []


def test_a_known_secret_in_a_setting_is_refused_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", key := "0123456789" * 4)
    with pytest.raises(
        MedcotError, match=r"^setting tracking\.project holds a secret of this machine \(environment MY_KEY\)\. "
    ) as caught:
        runner.plan_config(tmp_path / "run", "smoke", [f"tracking.project=of-{key}", "secrets.wandb=MY_KEY"])
    assert key not in str(caught.value) and not (tmp_path / "run").exists()


def test_secrets_are_handed_on_before_the_checks(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "0" * 40)
    config = load_config("smoke", ["secrets.wandb=MY_KEY"])
    preflight(config, None, online=False)
    assert "WANDB_API_KEY" not in os.environ
    preflight(config, tmp_path, online=False)
    assert os.environ["WANDB_API_KEY"] == "0" * 40


def test_more_processes_than_gpus_are_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(PlatformError, match="num_processes is 2, but only 1 can be seen"):
        runner.plan_config(tmp_path / "run", "smoke", ["training.num_processes=2"])


def test_notebook_01_shows_preflights_lines():
    notebook = json.loads((HOME / "notebooks" / "01_setup.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "preflight(config, run_dir)" in code
    shown = set(re.findall(r'checks\["(\w+)"\]', code)) | set(re.findall(r'"(\w+)"[,)](?=.* if name in checks)', code))
    assert shown == {"data", "questions", "answers", "tracker", "hub", "gguf"}
    assert "resolve_profile(PROFILE)" in code and "disk_table(config, run_dir)" in code, "the other two, in sections of their own"


def test_kaggle_build_refuses_too_many_questions(tmp_path):
    with pytest.raises(MedcotError, match=r"evaluation\.num_questions"):
        build(tmp_path, "smoke", ["evaluation.num_questions=500"])
    assert list(tmp_path.iterdir()) == []


def test_kaggle_build_asks_for_no_gpu_and_no_key_here(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", list)
    settings = ["tracking.backend=wandb", "tracking.mode=online", "hub.repo_id=ann/cot", "export.gguf=q8_0"]
    assert build(tmp_path, "article", settings).metadata.enable_gpu


# --- doctor ------------------------------------------------------------------------------------------------------------


def diagnosis(profile):
    return next(one for one in doctor.profiles_here(HOME / "no such folder") if one.profile == profile)


def test_doctor_names_everything_that_is_missing(monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", list)
    monkeypatch.setattr(disk.paths, "disk_free_gib", lambda folder: 0.01)
    found = diagnosis("article")
    assert not found.ok
    for part in ("not installed: unsloth", "no CUDA GPU is visible", "disk: "):
        assert part in found.reason


def test_doctor_tells_a_failed_check_of_preflight(monkeypatch):
    def missing(config):
        raise PlatformError("the shipped rows are gone")

    monkeypatch.setattr("medcot_utils.data.rows.check_data", missing)
    found = diagnosis("smoke")
    assert not found.ok and "the shipped rows are gone" in found.reason
