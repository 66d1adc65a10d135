"""`make audit`: advisories are listed with the reason that was given by hand, and silence is not taken for safety."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / ".ci" / "audit.py"
FAULTY = {"name": "thing", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}]}
SOUND = {"name": "steady", "version": "1.10", "vulns": []}
LEFT_OUT = {"name": "own", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture
def audit(tmp_path):
    """`audit(packages)`: (the process, .ci/advisories.md), with a pip-audit that answers so."""
    result = tmp_path / "advisories.md"

    def run(packages):
        program = tmp_path / "pip-audit"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps({'dependencies': packages})}\nEND\n")
        program.chmod(0o755)
        command = [sys.executable, str(PROGRAM), str(program), str(result)]
        return subprocess.run(command, capture_output=True, text=True, check=False), result

    return run


def test_an_advisory_fails_until_a_reason_stands_in_its_row(audit):
    done, result = audit([FAULTY, SOUND, LEFT_OUT])
    assert done.returncode == 1 and "move the pin, or write into advisories.md why it does not apply: PYSEC-1" in done.stderr
    text = result.read_text()
    assert "| thing 1.0 | PYSEC-1 | 1.1, 2.0 |  |" in text and "compared 2 packages" in text and "does not know: own." in text
    result.write_text(text.replace("|  |", "| only its server, which is not used |"))
    done, _ = audit([FAULTY, SOUND])
    assert done.returncode == 0 and done.stdout == "advisories.md: 2 packages, 1 advisories\n", done.stderr
    assert "| 1.1, 2.0 | only its server, which is not used |" in result.read_text()


def test_a_pypi_out_of_reach_is_no_clean_result(audit):
    done, result = audit([LEFT_OUT])
    assert done.returncode == 1 and "PyPI's advisories cannot be reached from here" in done.stderr
    assert not result.exists()
