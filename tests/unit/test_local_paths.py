"""Settings that name files of this machine: absolute, and as an earlier run wrote them."""

from __future__ import annotations

import re

import pytest

from medcot_utils.config import RunConfig, _fields, load_config, overrides_of
from medcot_utils.local_paths import _PATHS, with_absolute_paths


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a data set and an embedding model in it, as the working and the home folder."""
    for name in ("models/llama", "me/data", "minilm"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


LOCAL = [
    ("model.name", "models/llama", "models/llama"),
    ("model.name", "./models/other/", "models/other"),
    ("model.name", "~/models/llama", "models/llama"),
    ("model.quantized_name", "models/llama", "models/llama"),
    ("dataset.name", "me/data", "me/data"),
    ("dataset.path", "rows.jsonl", "rows.jsonl"),
    ("dataset.path", "~/x/../rows #1.jsonl", "rows #1.jsonl"),
    ("evaluation.mcq_tasks", "[shipped, own.jsonl, ~/more.jsonl]", ["shipped", "own.jsonl", "more.jsonl"]),
    ("evaluation.embedding_model", "minilm", "minilm"),
]


@pytest.mark.parametrize(("setting", "given", "path"), LOCAL)
def test_a_local_path_becomes_absolute(setting, given, path, here):
    config = with_absolute_paths(load_config("smoke", [f"{setting}={given}", "evaluation.num_questions=1"]))
    texts = path if isinstance(path, list) else [path]
    absolute = [text if text == "shipped" else str(here / text) for text in texts]
    assert config.get(setting) == (absolute if isinstance(path, list) else absolute[0])
    assert with_absolute_paths(config) == config == load_config("smoke", overrides_of(config))


@pytest.mark.parametrize(
    "override",
    [
        "model.name=me/other",
        "model.name=embedded:smollm2-135m-instruct",
        "dataset.name=shipped",
        "evaluation.mcq_tasks=[medqa, shipped]",
        "evaluation.embedding_model=a/b",
    ],
)
def test_a_name_on_the_hub_is_no_path(override, here):
    (here / "shipped").mkdir()
    config = load_config("smoke", [override])
    assert with_absolute_paths(config) == config


@pytest.mark.parametrize(("setting", "given", "path"), LOCAL)
def test_a_path_in_a_run_of_before_stays_as_it_was_written(setting, given, path, here):
    held = load_config("smoke", [f"{setting}={given}", "evaluation.num_questions=1"])
    again = with_absolute_paths(held)
    assert with_absolute_paths(held, held) == with_absolute_paths(again, held) == held
    (here.parent / f"{here.name}-link").symlink_to(here)
    linked = load_config("smoke", [pair.replace(str(here), f"{here}-link") for pair in overrides_of(again)])
    assert with_absolute_paths(linked, held) == held


def test_settings_that_may_be_local_are_all_known():
    told = {name for name, field in _fields(RunConfig).items() if re.search("local|folder", field.description or "", re.I)}
    assert told - {"model.revision"} <= set(_PATHS)
