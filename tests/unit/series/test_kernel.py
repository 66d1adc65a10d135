"""A kernel that cannot start is one line, before anything is written."""

from __future__ import annotations

import json
import sys

import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import PlatformError
from medcot_utils.series import runner
from medcot_utils.series.kernel import check_kernel


@pytest.fixture
def kernelspec(tmp_path, monkeypatch):
    """`kernelspec(program)`: the user's own python3 kernel starts that program."""

    def install(program):
        folder = tmp_path / "jupyter" / "kernels" / "python3"
        folder.mkdir(parents=True)
        argv = [str(program), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        return folder

    return install


def test_an_interpreter_without_ipykernel_is_named(kernelspec, tmp_path):
    bare = tmp_path / "python-bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    folder = kernelspec(bare)
    with pytest.raises(PlatformError) as caught:
        runner.run_series(tmp_path / "run", load_config("smoke"))
    assert f"({folder}) starts {bare}, which has no ipykernel_launcher: remove that folder" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_interpreter_that_is_not_there_is_named(kernelspec, tmp_path):
    kernelspec(tmp_path / "gone")
    with pytest.raises(PlatformError, match="gone, which is not there"):
        check_kernel()


@pytest.mark.parametrize("program", ["python", "python3", sys.executable])
def test_this_interpreter_is_taken_without_asking_it(program, kernelspec, monkeypatch):
    kernelspec(program)
    monkeypatch.setattr("subprocess.run", None)
    check_kernel()
