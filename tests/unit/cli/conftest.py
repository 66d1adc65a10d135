"""The command in this process, for every test of the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medcot_utils.cli import main


@pytest.fixture
def medcot_here(monkeypatch, capfd):
    """`medcot_here("run", …)`: the command as its entry point runs it, in this process, which has its libraries by now."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(main.console, "width", 200)

    def call(*arguments, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["medcot", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        said = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, ended.value.code or 0, said.out, said.err)

    return call
