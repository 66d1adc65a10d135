"""What a model's name says of it where a reader sees it, and the cache of the embedded ones."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import PlatformError
from medcot_utils.models import embedded
from medcot_utils.models.embedded import _folder_name, describe_model, find_hub_address, find_model_source, is_made
from medcot_utils.series.preflight import preflight


@pytest.mark.parametrize("there", [True, False])
def test_a_local_model_is_described_without_its_path(there, tmp_path):
    folder = tmp_path / "llama"
    if there:
        folder.mkdir()
    assert describe_model(str(folder)) == "llama (a local folder)"
    assert find_hub_address(str(folder)) is None
    assert describe_model("me/llama") == find_hub_address("me/llama") == "me/llama"


def test_a_download_through_an_unusable_proxy_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setenv("ALL_PROXY", "socks4://h:1")
    with pytest.raises(PlatformError, match="ALL_PROXY names a proxy of kind socks4"):
        find_model_source("me/llama")
    with pytest.raises(PlatformError, match="ALL_PROXY names a proxy of kind socks4"):
        preflight(load_config("smoke", ["model.name=me/llama"]), tmp_path / "run", online=False)
    assert find_model_source(str(tmp_path)) == str(tmp_path)


def test_a_cache_that_cannot_be_written_is_told_in_notebook_01(tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "home" / "cache"))
    with pytest.raises(PlatformError, match=r"embedded model cannot be written to .*: set MEDCOT_CACHE"):
        preflight(load_config("smoke"), tmp_path / "run", online=False)
    with pytest.raises(PlatformError, match="set MEDCOT_CACHE"):
        find_model_source("embedded:tiny-random-llama")
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDCOT_SCRATCH", str(tmp_path / "home" / "scratch"))
    with pytest.raises(PlatformError, match=r"merged model cannot be written to .*: set MEDCOT_SCRATCH"):
        preflight(load_config("smoke"), tmp_path / "run", online=False)


def test_a_converted_model_needs_no_writable_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path))
    assert not is_made("embedded:tiny-random-llama") and is_made("a/b")
    (tmp_path / _folder_name("tiny-random-llama")).mkdir()
    assert is_made("embedded:tiny-random-llama")


def test_a_process_knows_what_it_has_converted(monkeypatch, tmp_path):
    name = "embedded:tiny-random-llama"
    monkeypatch.setattr(embedded, "_converted_here", set())
    assert not embedded.was_made_here(name) and not embedded.was_made_here("a/b")
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path))
    find_model_source(name)
    assert embedded.was_made_here(name)


@pytest.mark.embedded
def test_a_first_run_shows_nothing_that_a_second_does_not(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path))
    find_model_source("embedded:smollm2-135m-instruct")
    assert "GGUF" not in "".join(capfd.readouterr())
