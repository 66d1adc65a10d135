"""Find out for `medcot doctor` which profiles this machine can run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import psutil

from medcot_utils.config import PROFILES, RunConfig, load_config, profile_needs
from medcot_utils.errors import MedcotError
from medcot_utils.machine import disk, hardware
from medcot_utils.machine.paths import GIB
from medcot_utils.machine.probe import measure_speed
from medcot_utils.series import preflight
from medcot_utils.series.estimate import SeriesEstimate, estimate_series

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "papermill")


@dataclass(frozen=True)
class Diagnosis:
    """Hold whether this machine can run a profile, and what that needs."""

    profile: str
    ok: bool
    reason: str  # what is missing, or what to expect
    memory_gib: float  # RAM that one kernel needs
    disk_gib: float | None  # disk space that the whole series still needs; None if it is unknown
    estimate: SeriesEstimate | None  # how long it will take; None if it cannot run here


def profiles_here(run_root: Path) -> list[Diagnosis]:
    """Return one diagnosis per profile. Its reason names everything that is missing."""
    gpus = hardware.visible_gpus()
    return [_diagnose(profile, run_root, gpus) for profile in PROFILES]


def _diagnose(profile: str, run_root: Path, gpus: list[hardware.Gpu]) -> Diagnosis:
    needs, config, faults = profile_needs(profile), load_config(profile), []
    missing = [name for name in (*PACKAGES, *needs.packages) if importlib.util.find_spec(name) is None]
    if missing:
        faults.append(f"not installed: {', '.join(missing)}")
    if needs.gpu_gib is not None:
        gpu, why_not = hardware.fitting_gpu(profile, gpus)
        faults += [] if gpu else [why_not]
    memory = psutil.virtual_memory().available / GIB
    if memory < needs.memory_gib:
        faults.append(f"{needs.memory_gib:.0f} GiB of memory needed, {memory:.1f} GiB free")
    room = disk.needs(config, run_root)
    faults += [f"disk: {line}" for line in disk.shortages(room)]
    if "datasets" not in missing:
        faults += _failed_checks(config, run_root)
    estimate = None if faults else estimate_series(config, run_root, measure_speed())
    sizes = [need.gib for need in room]
    written = None if None in sizes else sum(filter(None, sizes))
    return Diagnosis(profile, not faults, "; ".join(faults) or needs.expect, needs.memory_gib, written, estimate)


def _failed_checks(config: RunConfig, run_root: Path) -> list[str]:
    made, faults = preflight.checks(config, run_root, online=False), []
    made["profile"] = lambda: preflight.check_environment(config, run_root)  # `_diagnose` reports the GPU in fewer words
    for check in made.values():
        try:
            check()
        except MedcotError as error:
            faults.append(str(error))
    return faults
