"""What the environment may spoil is put right, or said in one line that names the variable."""

from __future__ import annotations

import importlib.util
import io
import os
import sys

import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import PlatformError
from medcot_utils.machine import environment
from medcot_utils.series.notebook import start

LEFT = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "PMI_SIZE": "4",
}


@pytest.fixture
def left_over(monkeypatch):
    """The environment in a shell of another job's."""
    for name, value in LEFT.items():
        monkeypatch.setenv(name, value)


def test_a_notebook_forgets_the_group_of_another_job(left_over, tmp_path, capsys):
    start(str(tmp_path / "run"))
    assert not LEFT.keys() & os.environ.keys()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "another job left it" in said
    assert all((name in said) == bool(value) for name, value in LEFT.items())


def test_the_command_forgets_the_group_of_another_job(left_over, monkeypatch, capsys):
    from medcot_utils.cli import main

    monkeypatch.setattr(main, "app", lambda: None)
    main.main()
    assert not LEFT.keys() & os.environ.keys()
    assert "MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err


def test_a_worker_keeps_its_group_but_no_empty_variable(left_over):
    assert environment.forget_process_group(empty_only=True) == []
    assert LEFT.keys() - os.environ.keys() == {"LOCAL_RANK"}


def test_a_variable_of_somebody_elses_is_left_alone(monkeypatch):
    for name in ("ROLE_ARN", "GROUP_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    assert environment.forget_process_group() == [] and os.environ["ROLE_ARN"] == "1"


# --- proxies -------------------------------------------------------------------------------------------------------

PASSWORD = "hunter2"


@pytest.mark.parametrize("library", ["httpx", "requests"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
def test_a_socks_proxy_without_its_library_is_named(name, library, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("sock") else find(name))
    monkeypatch.setenv(name, f"socks5h://me:{PASSWORD}@127.0.0.1:1080")
    with pytest.raises(PlatformError, match=rf"^{name} names a SOCKS proxy.*pip install '{library}\[socks\]'") as caught:
        environment.check_proxies(library=library)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("address", ["socks4://h:1", "ftp://h:1"])
def test_a_proxy_of_an_unknown_kind_is_named(address, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", address)
    with pytest.raises(PlatformError, match=r"^HTTP_PROXY names a proxy of kind (socks4|ftp)://.*expected http://"):
        environment.check_proxies()


@pytest.mark.parametrize("address", ["", "http://h:1", "HTTPS://h:1", "h:3128"])
def test_a_usual_proxy_is_no_fault(address, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", address)
    environment.check_proxies()


@pytest.mark.parametrize(
    ("overrides", "asks"),
    [
        ([], False),
        (["model.name=a/b"], True),
        (["model.name=/data/llama", "dataset.path=rows.jsonl"], False),
        (["dataset.name=a/b"], True),
        (["evaluation.mcq_tasks=[shipped, medqa]"], True),
        (["evaluation.mcq_tasks=own.jsonl", "evaluation.embedding_model=./mini"], False),
        (["evaluation.embedding_model=a/b"], True),
        (["hub.repo_id=a/b"], True),
    ],
)
def test_only_a_run_that_asks_the_hub_needs_a_proxy(overrides, asks):
    assert environment.asks_the_hub(load_config("smoke", overrides)) is asks


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_names_its_variable(tmp_path):
    (tmp_path / "file").touch()
    expected = r"downloads cannot be written to .*/file/hub \(Not a directory\): set HF_HOME to a folder that can be written"
    with pytest.raises(PlatformError, match=expected):
        environment.require_writable(tmp_path / "file" / "hub", "HF_HOME", "downloads")
    environment.require_writable(tmp_path / "not" / "yet", "HF_HOME", "downloads")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "looking changes nothing"


@pytest.mark.parametrize("setting", ["model.name", "model.quantized_name", "dataset.name", "evaluation.embedding_model"])
def test_a_local_folder_that_is_not_there_is_named(setting, tmp_path):
    config = load_config("smoke", [f"{setting}={tmp_path}/absent", "evaluation.num_questions=1"])
    with pytest.raises(PlatformError, match=rf"^{setting} .*/absent: no such folder on this machine"):
        environment.check_local_paths(config)
    environment.check_local_paths(load_config("smoke", ["dataset.path=/absent.csv", f"model.name={tmp_path}"]))


def test_a_terminal_without_a_character_gets_a_question_mark(monkeypatch):
    from medcot_utils.cli import main

    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(main, "app", lambda: print("Ödem …"))
    main.main()
    narrow.flush()
    assert narrow.buffer.getvalue() == b"?dem ?\n"
