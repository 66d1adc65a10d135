"""The hardware and software of this machine, and the profile that it can run."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import psutil
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import load_config, override_pairs, profile_needs
from medcot_utils.errors import MedcotError, PlatformError
from medcot_utils.machine.durations import TimeEstimate
from medcot_utils.machine.paths import GIB, cache_dir, disk_free_gib, platform_name
from medcot_utils.machine.secrets import secrets_found

# sm_60 (P100) is not in the wheels of today's torch, although torch.cuda.is_available() says True there.
MIN_COMPUTE_CAPABILITY = (7, 0)

VERSIONED_PACKAGES = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "unsloth",
    "wandb",
    "trackio",
    "kaggle",
    "papermill",
    "nbval",
]


def installed_versions(packages: Iterable[str] = VERSIONED_PACKAGES) -> dict[str, str | None]:
    """Return versions by package metadata, without an import. None: not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@dataclass(frozen=True)
class Gpu:
    """A visible CUDA GPU."""

    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]

    def shortcoming(self, needed_gib: float) -> str | None:
        """Return why a profile that needs so much GPU memory cannot run on this GPU, or None if it can."""
        if self.capability < MIN_COMPUTE_CAPABILITY:
            need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
            return f"{self.name}: compute capability {'.'.join(map(str, self.capability))}, needs {need} (choose a T4)"
        if self.memory_gib < needed_gib:
            return f"{self.name}: {self.memory_gib:.1f} GiB of memory, needs {needed_gib:.0f}"
        return None


def visible_gpus() -> list[Gpu]:
    """Return the visible CUDA GPUs; an empty list without torch or without a GPU."""
    try:
        import torch
    except ImportError:
        return []
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(properties.name, total / GIB, free / GIB, (properties.major, properties.minor)))
    return found


def resolve_profile(profile: str, gpus: list[Gpu] | None = None) -> tuple[str, str]:
    """Return the profile to run and one line saying why. `auto` takes `article` on a GPU that can hold it, else `demo`.

    Raises PlatformError as `check_profile` does."""
    if profile != "auto":
        return profile, check_profile(profile, gpus)
    gpu, why_not = fitting_gpu("article", gpus)
    if gpu is None:
        more = "" if _smaller(gpus) == "demo" else f"; profile {_smaller(gpus)} can run here"
        return "demo", f"profile demo: {why_not}{more}"
    return "article", f"profile article: {gpu.name} with {gpu.memory_gib:.0f} GiB can hold the 8B model"


def check_profile(profile: str, gpus: list[Gpu] | None = None) -> str:
    """Return one line on where a profile runs here. Raises PlatformError if it needs a GPU and no visible one can run it,
    ConfigError for an unknown profile."""
    needed = profile_needs(profile).gpu_gib
    if needed is None:
        return f"profile {profile}: as asked"
    gpu, why_not = fitting_gpu(profile, gpus)
    if gpu is None:
        raise PlatformError(
            f"profile {profile} needs a CUDA GPU with at least {needed:.0f} GiB: {why_not}. On Kaggle or Colab choose "
            f"a T4 accelerator; on this machine use profile {_smaller(gpus)}"
        )
    return f"profile {profile}: as asked, on {gpu.name}"


def _smaller(gpus: list[Gpu] | None) -> str:
    return "small" if fitting_gpu("small", gpus)[0] else "demo"


def require_gpus(num_processes: int, error_class: type[MedcotError] = PlatformError) -> None:
    """Raise `error_class` if there are GPUs, but fewer than processes to train in."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < num_processes:
        raise error_class(
            f"training.num_processes is {num_processes}, but only {gpus} can be seen: each process needs its own GPU. "
            f"Set training.num_processes={gpus}"
        )


def count_gpus_alike() -> int:
    """Return how many visible GPUs share work: the first one and those of its kind that follow it. 0 without a GPU.

    Work that is dealt out evenly takes as long as on the slowest, and memory is planned for all alike."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return len([*itertools.takewhile(lambda name: name == names[0], names)])


def name_other_gpus() -> list[str]:
    """Return the names, as CUDA_VISIBLE_DEVICES takes them, of the GPUs of `count_gpus_alike` less the first."""
    count = count_gpus_alike()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return named.split(",")[1:count]


def fitting_gpu(profile: str, gpus: list[Gpu] | None = None) -> tuple[Gpu | None, str]:
    """Return the first visible GPU that can run the profile, or None and why no GPU can."""
    needed = profile_needs(profile).gpu_gib or 0.0
    gpus = visible_gpus() if gpus is None else gpus
    fitting = next((gpu for gpu in gpus if gpu.shortcoming(needed) is None), None)
    return fitting, "; ".join(filter(None, (gpu.shortcoming(needed) for gpu in gpus))) or "no CUDA GPU is visible"


# Instruction sets that decide how a CPU computes a model, and so which greedy answers it gives, by their flags in Linux.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "bfloat16",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "bf16": "bfloat16",
}


def describe_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the architecture and instruction sets, as in `x86_64 with AVX2, AVX-512`; never a model's name."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    lines = [line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    flags = set(" ".join(lines[:1]).split())
    found = ", ".join(dict.fromkeys(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags))
    return f"{platform.machine()} with {found}" if found else platform.machine()


class MachineReport(TypedDict):
    """machine.json of a run."""

    platform: str  # kaggle, colab or local
    system: str  # name and architecture
    python: str
    processor: str  # architecture and instruction sets; absent in earlier runs
    cpu_cores: int | None
    memory_gib: float
    memory_free_gib: float
    disk_free_gib: float  # where the run is kept
    cache_disk_free_gib: float  # where converted models are kept
    gpus: str  # names and GiB, or `none`
    versions: dict[str, str | None]  # None: not installed
    secrets: dict[str, str]  # {service: where its secret was found}; never a value
    estimate: NotRequired[dict[str, TimeEstimate]]  # {notebook: its time}; absent in earlier runs and if nobody can tell


def machine_report(run_dir: Path, overrides: Iterable[str] | str = ()) -> MachineReport:
    """Return what a reader must know of the machine.

    Secrets are looked for under the names that `overrides` set; its other settings are not looked at. Raises ConfigError for
    a name that is no name of a secret."""
    names = load_config("smoke", [pair for pair in override_pairs(overrides) if pair.strip().startswith("secrets.")]).secrets
    memory = psutil.virtual_memory()
    return {
        "platform": platform_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "processor": describe_processor(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory.total / GIB, 1),
        "memory_free_gib": round(memory.available / GIB, 1),
        "disk_free_gib": round(disk_free_gib(run_dir), 1),
        "cache_disk_free_gib": round(disk_free_gib(cache_dir()), 1),
        "gpus": ", ".join(f"{gpu.name}, {gpu.memory_gib:.0f} GiB" for gpu in visible_gpus()) or "none",
        "versions": installed_versions(),
        "secrets": secrets_found(names),
    }
