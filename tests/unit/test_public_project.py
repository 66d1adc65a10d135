"""What a public project has around its code: continuous integration, hooks, templates, a citation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ACTIONLINT = shutil.which("actionlint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_ci_on_every_python_that_is_supported():
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    lowest, highest = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(int(lowest), int(highest))]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


@pytest.mark.skipif(ACTIONLINT is None, reason="actionlint is not installed: `make lint` installs the pins")
def test_actionlint_finds_a_broken_workflow(tmp_path):
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    for content, faults in ((text, ""), (text.replace("matrix.python", "matrix.pithon"), 'property "pithon" is not defined')):
        (tmp_path / "ci.yml").write_text(content)
        done = subprocess.run([ACTIONLINT, "ci.yml"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert faults in done.stdout and bool(done.returncode) == bool(faults), done.stdout


def test_the_hooks_are_local_and_run_what_make_lint_runs():
    hooks = [hook for repository in read(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in read(".pre-commit-config.yaml")["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    for hook in hooks:
        assert hook["entry"].removesuffix(" --force-exclude") in lint


def test_every_issue_template_has_what_github_asks_for():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(template), path.name
            assert len({part["id"] for part in template["body"]}) == len(template["body"]), path.name
            assert all(part["attributes"]["label"] for part in template["body"]), path.name


def test_the_citation_agrees_with_the_package():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert citation["authors"] == [{"name": "medcot contributors"}]
    assert citation["license"] == PROJECT["license"]
    assert "version" not in citation, "the version stands once, in medcot_utils/__init__.py"
