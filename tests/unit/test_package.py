"""The package as it is published: its version, and the files of its wheel and sdist."""

from __future__ import annotations

import ast
import re
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from wheels import ROOT, build, copy_of_the_project, tracked

import medcot_utils

# Made by setuptools; no file of the project.
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|medcot_utils\.egg-info/.+")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The tracked files, and beside them files that somebody keeps in a checkout."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("project"))
    for name in (
        "notebooks/mine.ipynb",
        "notebooks/01_setup-Copy1.ipynb",
        "medcot_utils/data/patients.jsonl",
        "runs/a/config.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    return folder


@pytest.fixture(scope="module")
def wheel(project, tmp_path_factory):
    return build("wheel", project, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_the_notebooks(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        notebooks = {name: archive.read(name) for name in names if name.endswith(".ipynb")}
    expected = {name for name in tracked() if name.startswith("medcot_utils/")}
    expected |= {f"medcot_utils/{name}" for name in tracked() if Path(name).match("notebooks/*.ipynb")}
    assert names == expected
    assert len(notebooks) == 7
    for name, content in notebooks.items():
        assert content == (ROOT / "notebooks" / Path(name).name).read_bytes()


def test_the_sdist_holds_what_git_tracks(project, tmp_path):
    with tarfile.open(build("sdist", project, tmp_path)) as archive:
        names = {entry.name.partition("/")[2] for entry in archive if entry.isfile()}
    assert {name for name in names if not GENERATED.fullmatch(name)} == tracked()


def test_the_version_stands_once(wheel):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in settings["project"] and "version" in settings["project"]["dynamic"]
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"medcot_utils-{medcot_utils.__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == medcot_utils.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest[1] == medcot_utils.__version__, "the changelog begins with another version"


def test_the_extra_cpu_holds_every_pin(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    extra = {line.partition(";")[0] for line in metadata.get_all("Requires-Dist") if 'extra == "cpu"' in line}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines())
    assert extra == {line for line in lines if line}


# What loads a model, a tokenizer or a data set of others. PEFT and GenerationConfig have no such argument; a data set's builder
# has none since datasets 4.
LOADERS = re.compile(
    r"(Auto(Model\w*|Config|Tokenizer)|FastLanguageModel)\.from_(pretrained|config)|load_dataset|SentenceTransformer|harness|HFLM"
)


def test_every_loader_is_told_to_run_no_code_of_others():
    """Where arguments come from a dictionary (`**how`), the function that makes it says so."""
    calls, silent = 0, []
    for path in sorted((ROOT / "medcot_utils").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            told = "'trust_remote_code': False" in ast.unparse(function)
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if LOADERS.fullmatch(ast.unparse(call.func)):
                    calls += 1
                    by_name = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                    if by_name.get("trust_remote_code") != "False" and not (None in by_name and told):
                        silent.append(f"{path.name}:{call.lineno}")
    assert silent == [] and calls > 15


def test_a_data_sets_files_are_looked_at_before_it_is_loaded():
    loaders = []
    for path in sorted((ROOT / "medcot_utils").rglob("*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]
        loaders += [text for text in map(ast.unparse, functions) if " load_dataset(" in text]
    assert len(loaders) == 2 and all(0 < text.find(" find_files(") < text.find(" load_dataset(") for text in loaders)
