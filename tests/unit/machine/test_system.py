"""Another system than Linux is met with one line, before a module that only Linux has is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medcot_utils.cli import main as command
from medcot_utils.machine import installing


def test_another_system_is_one_line_and_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 1
    assert said.startswith("medcot: medcot needs Linux, and this is win32: use WSL on Windows") and "\n" not in said


def test_a_notebook_on_another_system_says_the_same(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(installing.InstallError, match="this is darwin"):
        installing.ensure()


@pytest.mark.parametrize("module", ["medcot_utils.cli.main", "medcot_utils.series.notebook"])
def test_that_line_comes_before_the_run_directory_is_imported(module):
    # run.directory imports `resource`, which Windows does not have.
    code = f"import sys, {module}; sys.exit('medcot_utils.run.directory' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
