"""`make platforms`: pins that would take a package from the running session are found, and nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from wheels import write_wheel

PROGRAM = Path(__file__).parents[2] / ".ci" / "platforms.py"
HELD = ["ipykernel==6.17.1", "traitlets==5.7.1", "numpy==2.1.3", "torch==2.11.0+cu128", "torchvision==0.26.0+cu128"]


pytestmark = pytest.mark.pip


@pytest.fixture
def platforms(tmp_path):
    """`platforms(["app==1.0"], {"app==1.0": ["traitlets>=5.14"]})`: the process, over a session that holds HELD."""

    def run(pins, needs, *options):
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        needs = {"ipykernel==6.17.1": ["traitlets>=5"]} | needs
        for line in {*HELD[:3], *pins, "traitlets==5.14.3"}:
            write_wheel(wheels, *line.split("=="), needs.get(line, ()))
        (tmp_path / "freeze.txt").write_text("# a session\n" + "\n".join(HELD) + "\n")
        for name in ("requirements.txt", "requirements-cpu.txt"):
            (tmp_path / name).write_text("\n".join(pins))
        (tmp_path / "requirements-nodeps.txt").write_text("")
        command = [sys.executable, str(PROGRAM), "--home", str(tmp_path), "--freeze", str(tmp_path / "freeze.txt"), *options]
        environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_pins_that_leave_the_session_whole_pass(platforms):
    done = platforms(["numpy==2.4.6", "app==1.0", "ipykernel==6.17.1"], {"app==1.0": ["traitlets>=5"]})
    assert done.returncode == 0, done.stderr
    assert "1 replaced: numpy 2.1.3 -> 2.4.6" in done.stdout and "1 new: app 1.0" in done.stdout
    assert "of the running session: none" in done.stdout


def test_a_pin_that_would_replace_the_kernel_fails(platforms):
    done = platforms(["app==1.0"], {"app==1.0": ["traitlets>=5.14"]})
    assert done.returncode == 1 and "the pins do not resolve: app 1.0 depends on traitlets>=5.14" in done.stderr


def test_a_plain_install_is_shown_to_compare(platforms, tmp_path):
    plain = ["--plain", str(tmp_path / "requirements.txt")]
    done = platforms(["app==1.0"], {"app==1.0": ["traitlets>=5.14"]}, *plain)
    assert done.returncode == 0 and "of the running session: traitlets" in done.stdout, done.stderr
