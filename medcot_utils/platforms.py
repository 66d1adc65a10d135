"""Where the series runs: platform, secrets, GPUs, memory, disk, and which profile that allows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medcot_utils.errors import MedcotError

GIB = 1024**3

# Measured on the article's settings at 8B (4-bit, 2 x 4 rows of up to 2,048 tokens): 6.5 to 7.3 GiB reserved. A 12 GB
# card ran it with batch 1 x 4 at 7.83 GB. Below this the run would end in an out-of-memory error after the download.
ARTICLE_GPU_GIB = 8.0
# sm_60 (P100) is not in the wheels of today's torch, although torch.cuda.is_available() says True there.
MIN_COMPUTE_CAPABILITY = (7, 0)

SECRET_NAMES = {
    "Hugging Face": ("HF_TOKEN", "HUGGINGFACE_TOKEN"),
    "Weights & Biases": ("WANDB_API_KEY", "wandb"),
}

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
    "kaggle",
    "papermill",
    "nbval",
]


class PlatformError(MedcotError):
    """This machine cannot run what was asked for; the message says what is missing and what to do."""


def platform_name() -> str:
    """`kaggle`, `colab` or `local`. From environment variables, which survive papermill; the IPython shell's name does not."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else "local"


def kaggle_root() -> Path:
    """The folder of Kaggle's `working` and `input`; MEDCOT_KAGGLE_ROOT puts another in its place for a rehearsal."""
    return Path(os.environ.get("MEDCOT_KAGGLE_ROOT") or "/kaggle")


def default_run_dir() -> Path:
    """Where notebooks opened by hand keep their run: MEDCOT_RUN_DIR, else the platform's working folder."""
    if chosen := os.environ.get("MEDCOT_RUN_DIR"):
        return Path(chosen)
    roots = {"kaggle": kaggle_root() / "working", "colab": Path("/content")}
    root = roots.get(platform_name())
    if root is None:
        here = Path.cwd()
        root = here.parent if here.name == "notebooks" else here
    return root / "runs" / "notebooks"


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
        """Why the article profile cannot run on this card, or None."""
        if self.capability < MIN_COMPUTE_CAPABILITY:
            need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
            return f"{self.name}: compute capability {'.'.join(map(str, self.capability))}, needs {need} (choose a T4)"
        if self.memory_gib < ARTICLE_GPU_GIB:
            return f"{self.name}: {self.memory_gib:.1f} GiB of memory, needs {ARTICLE_GPU_GIB:.0f}"
        return None


def gpus() -> list[Gpu]:
    """The visible CUDA cards; an empty list without torch or without a card."""
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


def resolve_profile(profile: str, cards: list[Gpu] | None = None) -> tuple[str, str]:
    """The profile to run and one line saying why. `auto` takes `article` on a card that can hold it, else `demo`.

    Raises PlatformError when an 8B profile was asked for by name and no visible card can run it."""
    needs_card = profile in ("article", "recommended", "full")
    if profile != "auto" and not needs_card:
        return profile, f"profile {profile}: as asked"
    cards = gpus() if cards is None else cards
    fitting = [card for card in cards if card.problem() is None]
    if profile == "auto":
        if fitting:
            return (
                "article",
                f"profile article: {fitting[0].name} with {fitting[0].memory_gib:.0f} GiB can hold the 8B model",
            )
        why = "; ".join(filter(None, (card.problem() for card in cards))) or "no CUDA card is visible"
        return "demo", f"profile demo: {why}"
    if fitting:
        return profile, f"profile {profile}: as asked, on {fitting[0].name}"
    why = "; ".join(filter(None, (card.problem() for card in cards))) or "no CUDA card is visible"
    raise PlatformError(
        f"profile {profile} needs a CUDA card with at least {ARTICLE_GPU_GIB:.0f} GiB: {why}. On Kaggle or Colab choose "
        f"a T4 accelerator; on this machine use profile demo"
    )


def disk_free_gib(folder: Path) -> float:
    """Free GiB where `folder` is or would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


def require_disk(folder: Path, need_gib: float, purpose: str) -> float:
    """The free GiB at `folder`. Raises PlatformError naming place, need and what is free if there is too little."""
    free = disk_free_gib(folder)
    if free < need_gib:
        raise PlatformError(
            f"too little disk for {purpose}: {need_gib:.2f} GiB needed where {folder.name}/ lies, {free:.2f} GiB free. "
            f"Free some space, or give a run directory on a larger disk (--run-dir)"
        )
    return free


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`: `.NAME.PID.tmp` and `.NAME.PID.old` of a PID that is gone."""
    for path in folder.glob(".*"):
        leftover = re.fullmatch(r"\..+\.(\d+)\.(?:tmp|old)", path.name)
        if leftover and not psutil.pid_exists(int(leftover[1])):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def folder_gib(folder: Path) -> float:
    """GiB of the files below `folder`; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / GIB


def cache_dir() -> Path:
    """Where converted models are kept between runs: MEDCOT_CACHE, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("MEDCOT_CACHE") or platformdirs.user_cache_dir("medcot"))


def _from_kaggle(name: str) -> str | None:
    from kaggle_secrets import UserSecretsClient

    return UserSecretsClient().get_secret(name)


def _from_colab(name: str) -> str | None:
    from google.colab import userdata

    return userdata.get(name)


def _secret_sources() -> list[tuple[str, Callable[[str], str | None]]]:
    sources: list[tuple[str, Callable[[str], str | None]]] = [("environment", os.environ.get)]
    if platform_name() == "kaggle":
        sources.append(("Kaggle secret", _from_kaggle))
    # Under papermill Colab's userdata waits 10 s for a front end that is not there: ask only in a live notebook.
    if platform_name() == "colab" and "PAPERMILL" not in os.environ:
        sources.append(("Colab secret", _from_colab))
    return sources


def find_secret(names: Iterable[str]) -> tuple[str, str] | None:
    """(value, where it was found) of the first name that any source holds, or None. Never print the first part."""
    for label, ask in _secret_sources():
        for name in names:
            try:
                value = ask(name)
            except Exception:  # noqa: BLE001 - not attached, offline, denied, timed out: each service raises its own kinds
                value = None
            if value:
                return value, f"{label} {name}"
    return None


def secrets_found() -> dict[str, str]:
    """For each service where its secret comes from, or `not found`; never a value."""
    found = {}
    for service, names in SECRET_NAMES.items():
        hit = find_secret(names)
        found[service] = hit[1] if hit else "not found"
    return found


def hand_on_secrets() -> None:
    """Put found secrets into the environment under the names their clients read, for kernels that this process starts."""
    for names in SECRET_NAMES.values():
        hit = find_secret(names)
        if hit and names[0] not in os.environ:
            os.environ[names[0]] = hit[0]


def machine_report(run_dir: Path) -> dict[str, Any]:
    """What a reader must know of the machine: platform, cores, memory and disk in GiB, cards, versions, secrets by source."""
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
        "gpus": ", ".join(f"{card.name}, {card.memory_gib:.0f} GiB" for card in gpus()) or "none",
        "versions": installed_versions(),
        "secrets": secrets_found(),
    }
