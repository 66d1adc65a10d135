"""What this machine has: GPUs, memory, secrets, versions, and which profile that allows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medcot_utils.config import load_config
from medcot_utils.errors import PlatformError
from medcot_utils.machine.paths import GIB, cache_dir, disk_free_gib, platform_name
from medcot_utils.machine.secrets import secrets_found

# Measured on the article's settings at 8B (4-bit, 2 x 4 rows of up to 2,048 tokens): 6.5 to 7.3 GiB reserved. A 12 GB
# GPU ran it with batch 1 x 4 at 7.83 GB. Below this the run would end in an out-of-memory error after the download.
ARTICLE_GPU_GIB = 8.0
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
    """Versions from package metadata: nothing is imported. None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]

    def problem(self) -> str | None:
        """Why the article profile cannot run on this GPU, or None."""
        if self.capability < MIN_COMPUTE_CAPABILITY:
            need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
            return f"{self.name}: compute capability {'.'.join(map(str, self.capability))}, needs {need} (choose a T4)"
        if self.memory_gib < ARTICLE_GPU_GIB:
            return f"{self.name}: {self.memory_gib:.1f} GiB of memory, needs {ARTICLE_GPU_GIB:.0f}"
        return None


def visible_gpus() -> list[Gpu]:
    """The visible CUDA GPUs; an empty list without torch or without a GPU."""
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
    """The profile to run and one line saying why. `auto` takes `article` on a GPU that can hold it, else `demo`.

    Raises PlatformError when an 8B profile was asked for by name and no visible GPU can run it."""
    needs_gpu = profile in ("article", "recommended", "full")
    if profile != "auto" and not needs_gpu:
        return profile, f"profile {profile}: as asked"
    gpus = visible_gpus() if gpus is None else gpus
    fitting = [gpu for gpu in gpus if gpu.problem() is None]
    if profile == "auto":
        if fitting:
            return (
                "article",
                f"profile article: {fitting[0].name} with {fitting[0].memory_gib:.0f} GiB can hold the 8B model",
            )
        why = "; ".join(filter(None, (gpu.problem() for gpu in gpus))) or "no CUDA GPU is visible"
        return "demo", f"profile demo: {why}"
    if fitting:
        return profile, f"profile {profile}: as asked, on {fitting[0].name}"
    why = "; ".join(filter(None, (gpu.problem() for gpu in gpus))) or "no CUDA GPU is visible"
    raise PlatformError(
        f"profile {profile} needs a CUDA GPU with at least {ARTICLE_GPU_GIB:.0f} GiB: {why}. On Kaggle or Colab choose "
        f"a T4 accelerator; on this machine use profile demo"
    )


# --- secrets -------------------------------------------------------------------------------------------------------


# --- summary -------------------------------------------------------------------------------------------------------


def machine_report(run_dir: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a reader must know of the machine: platform, cores, memory and disk in GiB, GPUs, versions, secrets by source.

    Secrets are looked for under the names that `overrides` set; its other settings are not looked at. Raises ConfigError for a
    name that is none."""
    names = load_config("smoke", [pair for pair in overrides if pair.strip().startswith("secrets.")]).secrets
    memory = psutil.virtual_memory()
    return {
        "platform": platform_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory.total / GIB, 1),
        "memory_free_gib": round(memory.available / GIB, 1),
        "disk_free_gib": round(disk_free_gib(run_dir), 1),
        "cache_disk_free_gib": round(disk_free_gib(cache_dir()), 1),
        "gpus": ", ".join(f"{gpu.name}, {gpu.memory_gib:.0f} GiB" for gpu in visible_gpus()) or "none",
        "versions": installed_versions(),
        "secrets": secrets_found(names),
    }
