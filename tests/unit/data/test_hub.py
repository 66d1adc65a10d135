"""A data set of others runs no code where it is loaded, and brings no file of this machine."""

from __future__ import annotations

import json

import pytest
from fsspec.registry import _registry

from medcot_utils.config import load_config
from medcot_utils.data.files import DataError
from medcot_utils.data.rows import load_rows
from medcot_utils.evaluation.mcq.questions import McqError, read_questions

REFUSED = "could not be loaded from the Hub.*its README names files by fsspec's protocol `reference`, which could run code"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A data set whose README takes its rows from a file of references, with a template that writes a file."""
    monkeypatch.delitem(_registry, "reference", raising=False)  # a test before this one had it refused
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path / 'was-here'}') }}}}"
    generated = {"key": "0.jsonl", "url": template, "dimensions": {"i": [0]}}
    (tmp_path / "refs.json").write_text(json.dumps({"version": 1, "templates": {}, "refs": {}, "gen": [generated]}))
    files = f"reference://*.jsonl::file://{tmp_path / 'refs.json'}"
    readme = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(files)}\n---\n"
    (tmp_path / "README.md").write_text(readme)
    return tmp_path


def test_a_data_set_whose_readme_runs_code_is_refused(evil):
    with pytest.raises(DataError, match=REFUSED) as caught:
        load_rows(load_config("smoke", [f"dataset.name={json.dumps(str(evil))}"]).dataset)
    assert not (evil / "was-here").exists() and "\n" not in str(caught.value)


def test_questions_whose_readme_runs_code_are_refused(evil):
    with pytest.raises(McqError, match=REFUSED):
        read_questions(str(evil), split="test")
    assert not (evil / "was-here").exists()


@pytest.fixture(params=["file://{}", "{}"])
def greedy(request, tmp_path):
    """A data set whose README takes its rows from another folder of this machine."""
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"Question": "My diary?", "Complex_CoT": "Hm.", "Response": "Yes."}) + "\n")
    folder = tmp_path / "set"
    folder.mkdir()
    files = json.dumps(request.param.format(own))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    return folder


def test_a_data_set_whose_readme_names_other_files_is_refused(greedy):
    with pytest.raises(DataError, match=r"its README names '.*own\.jsonl', which is not on the Hub: medcot does not read it"):
        load_rows(load_config("smoke", [f"dataset.name={json.dumps(str(greedy))}"]).dataset)
    with pytest.raises(McqError, match="which is not on the Hub"):
        read_questions(str(greedy), split="train")
