"""`make pins`: what could move is shown with its reason, and nothing is written unless asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / ".ci" / "pins.py"
STACK = "# the stack\n\nthing==1.0        # 2.0 is slower\nsteady==1.10\nloose\ngone==1.0\n"


@pytest.fixture
def pins(tmp_path, monkeypatch):
    """`pins("--write")`: (the process, the requirements file), with a package index in a folder."""
    for name, versions in {"thing": ("1.0", "2.0", "3.0rc1"), "steady": ("1.9", "1.10")}.items():
        page = tmp_path / "simple" / name / "index.html"
        page.parent.mkdir(parents=True)
        files = [f"{name}-{version}-py3-none-any.whl" for version in versions]
        page.write_text("".join(f'<a href="{file}">{file}</a>' for file in files))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    file = tmp_path / "requirements.txt"
    file.write_text(STACK)

    def run(*options):
        command = [sys.executable, str(PROGRAM), str(file), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False), file.read_text()

    return run


def test_what_could_move_is_shown_and_nothing_is_written(pins):
    done, text = pins()
    assert done.stdout.splitlines() == [
        "thing: 1.0 -> 2.0  # 2.0 is slower",
        "gone: 1.0 -> not on the index",
        "requirements.txt: 1 of 3 pins could move",
    ], done.stderr
    assert text == STACK


def test_write_moves_the_named_pins_and_keeps_the_rest(pins):
    done, text = pins("--only", "thing", "--write")
    assert done.stdout.splitlines()[-1] == "requirements.txt: 1 of 1 pins moved", done.stderr
    assert text == STACK.replace("thing==1.0", "thing==2.0")


def test_a_name_that_the_file_does_not_pin_is_one_line(pins):
    done, text = pins("--only", "thin")
    assert done.returncode == 1 and text == STACK
    assert done.stderr == "requirements.txt pins no thin: name packages as the file does\n"
