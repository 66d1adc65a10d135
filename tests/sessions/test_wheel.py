"""The wheel alone, in an environment of its own and an empty folder, runs the whole series."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from wheels import build, copy_of_the_project

from medcot_utils.run.artifacts import STEPS


@pytest.fixture
def installed(tmp_path):
    """The folder of a new environment: the wheel, and the libraries of this one behind it (the index is not asked)."""
    wheel = build("wheel", copy_of_the_project(tmp_path / "project"), tmp_path / "wheel")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file adds that folder only: the editable install's own .pth file in it is not read.
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    return environment


def test_an_installed_wheel_runs_the_smoke_series(installed, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def call(*command):
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    program = str(installed / "bin" / "medcot")
    where = call(str(installed / "bin" / "python"), "-c", "import medcot_utils; print(medcot_utils.__file__)")
    assert Path(where.strip()).is_relative_to(installed), "another installation was tested"
    call(program, "run", "--profile", "smoke")
    found = json.loads(call(program, "status", "runs/smoke", "--json"))
    assert {step["name"]: step["state"] for step in found["steps"]} == dict.fromkeys(STEPS, "done")
    assert [path.name for path in empty.iterdir()] == ["runs"]
