"""Real installs into a session of its own: pins replaced, the kernel left, and a restart asked for only if a replaced package was
loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
import pytest
from wheels import ROOT, write_wheel

pytestmark = pytest.mark.pip

SESSION = """
import sys
from pathlib import Path
from medcot_utils.machine import installing
for name in {loaded}:
    __import__(name)
installing.has_gpu = lambda: {gpu}
installing.torch_fault = lambda: None
try:
    installing.ensure(Path({home!r}))
    installing.ensure(Path({home!r}))
except installing.InstallError as error:
    print(type(error).__name__, error)
    try:
        isinstance(error, installing.RestartNeeded) and installing.ensure(Path({home!r}))
    except installing.RestartNeeded:
        print("asked again")
"""


@pytest.fixture
def session(tmp_path):
    """`session(pins, held, loaded=[])`: what a Colab kernel prints that installs these pins over these packages, each of them a
    wheel of one module, and {package: version} of what it then has."""

    def run(pins, held, loaded=(), needs=None, gpu=False):
        wheels, home, modules, place = (tmp_path / name for name in ("wheels", "home", "modules", "place"))
        for folder in (wheels, home, modules):
            folder.mkdir()
        # Not of the session: this environment's pip, and what medcot_utils.machine.paths imports.
        (modules / "pip").symlink_to(Path(pip.__file__).parent)
        (modules / "psutil.py").touch()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
        (site_packages,) = place.glob("lib/python*/site-packages")
        for line in [*held, *pins]:
            name, _, version = line.partition("==")
            wheel = write_wheel(wheels, name, version, (needs or {}).get(line, ()))
            if line in held:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site_packages)
        for name in ("requirements.txt", "requirements-cpu.txt"):
            (home / name).write_text("\n".join(pins))
        (home / "requirements-nodeps.txt").write_text("")
        environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{modules}", "COLAB_RELEASE_TAG": "release", "PATH": os.environ["PATH"]}
        code = SESSION.format(loaded=list(loaded), gpu=gpu, home=str(home))
        command = [str(place / "bin" / "python"), "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, dict(info.stem.rsplit("-", 1) for info in site_packages.glob("*.dist-info"))

    return run


def test_an_install_replaces_pins_and_leaves_the_kernel(session):
    held = ["ipykernel==6.17.1", "traitlets==5.7.1", "numpy==2.1.3"]
    needs = {"ipykernel==6.17.1": ["traitlets"]}
    said, have = session(["ipykernel==7.4.0", "numpy==2.4.6", "extra_one==1.0"], held, needs=needs)
    assert have == {"ipykernel": "6.17.1", "traitlets": "5.7.1", "numpy": "2.4.6", "extra_one": "1.0"}
    assert "1 packages new, 1 replaced; unchanged: the packages of the kernel" in said and "Restart" not in said


def test_a_pin_that_needs_another_kernel_is_refused_by_name(session):
    said, have = session(["app==1.0"], ["traitlets==5.7.1"], needs={"app==1.0": ["traitlets>=5.14"]})
    assert (
        "InstallError" in said and "app 1.0 depends on traitlets>=5.14; The user requested (constraint) traitlets==5.7.1" in said
    )
    assert have == {"traitlets": "5.7.1"}


@pytest.mark.parametrize("loaded", [["numpy"], ["tidy"], []])
def test_a_restart_is_asked_only_for_a_replaced_loaded_package(loaded, session):
    said, _ = session(["numpy==2.4.6"], ["numpy==2.1.3", "tidy==1.0"], loaded)
    if loaded == ["numpy"]:
        assert "RestartNeeded" in said and "already loaded numpy 2.1.3 (installed now: 2.4.6)" in said and "asked again" in said
    else:
        assert "Restart" not in said, "what was replaced is not loaded"


def test_a_replaced_library_outside_the_list_is_named_too(session):
    said, _ = session(["helper==2.0"], ["helper==1.0"], ["helper"])
    assert "already loaded helper 1.0 (installed now: 2.0)" in said and "asked again" in said


def test_torch_for_the_cpu_is_replaced_and_its_companions_go(session):
    held = ["torch==2.9.0+cpu", "torchaudio==2.9.0+cpu"]
    said, have = session(["torch==2.11.0"], held, gpu=True)
    assert have == {"torch": "2.11.0"}
    assert "torchaudio: removed, because they were built for the earlier torch" in said
