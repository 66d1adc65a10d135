"""Traps of this machine's environment: variables that another job left, proxies, and folders that cannot be written."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.errors import PlatformError
from medcot_utils.machine.paths import disk_of

if TYPE_CHECKING:
    from medcot_utils.config import RunConfig

# What torchrun and MPI tell the processes that they start. Accelerate joins a group by them, and waits for its other members.
_MPI = [f"{mpi}_{what}" for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") for what in ("RANK", "SIZE", "LOCAL_RANK")]
_TORCHRUN = [f"{of}{what}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")]
_GROUP = (*_TORCHRUN, *_MPI, "MASTER_ADDR", "MASTER_PORT")
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def forget_process_group(empty_only: bool = False) -> list[str]:
    """Remove the variables of a group of processes from this process's environment, and return the names of those that had a
    value. For processes that belong to none: all but those of `training.worker`, in which only empty ones go."""
    names = [name for name in os.environ if name in _GROUP or name.startswith("TORCHELASTIC_")]
    removed = {name: os.environ.pop(name) for name in names if not (empty_only and os.environ[name])}
    return sorted(name for name, value in removed.items() if value)


def tell_forgotten(names: list[str]) -> str:
    """Return one line on what `forget_process_group` removed."""
    return f"ignored, because another job left it in the environment: {', '.join(names)}"


def check_local_paths(config: RunConfig) -> None:
    """Raise PlatformError for a folder of the settings that is not on this machine. Files are looked for where they are read."""
    from medcot_utils.local_paths import local_paths

    for setting, paths in local_paths(config).items():
        files = setting in ("dataset.path", "evaluation.mcq_tasks")
        if absent := [path for path in paths if not files and not Path(path).expanduser().exists()]:
            raise PlatformError(f"{setting} {absent[0]}: no such folder on this machine. Fix the path, or give a name on the Hub")


def asks_the_hub(config: RunConfig) -> bool:
    """Return whether a run of these settings reads from the Hugging Face Hub or writes to it."""
    from medcot_utils.local_paths import local_paths

    local, evaluation, model, data = local_paths(config), config.evaluation, config.model, config.dataset
    files = all(task == "shipped" or task.endswith(".jsonl") for task in evaluation.mcq_tasks)
    return (
        not (model.name.startswith("embedded:") or "model.name" in local)
        or not (data.path or data.name == "shipped" or "dataset.name" in local)
        or not (files and (evaluation.embedding_model is None or "evaluation.embedding_model" in local))
        or config.hub.repo_id is not None
    )


def check_proxies(client: str = "the Hub's client", library: str = "httpx") -> None:
    """Raise PlatformError for a proxy variable that a client cannot use: a SOCKS proxy without the library for it, or another
    kind of address. The address itself is not repeated, since it may hold a password.

    Args:
        client: who cannot use it, for the message.
        library: what it is made with, httpx or requests."""
    needs, package = {"httpx": ("socksio", "httpx[socks]"), "requests": ("socks", "requests[socks]")}[library]
    for name in (spelled for upper in _PROXIES for spelled in (upper, upper.lower())):
        scheme, found, _ = os.environ.get(name, "").strip().partition("://")
        if not found or scheme.lower() in ("http", "https"):
            continue
        if scheme.lower() not in ("socks5", "socks5h"):
            raise PlatformError(
                f"{name} names a proxy of kind {scheme}://, which {client} cannot use: expected http://, https://, or socks5://. "
                f"Fix it, or unset it"
            )
        if importlib.util.find_spec(needs) is None:
            raise PlatformError(
                f"{name} names a SOCKS proxy, and {client} needs another library for it: pip install '{package}', or unset it"
            )


def require_writable(folder: Path, variable: str, what: str) -> None:
    """Raise PlatformError naming the environment variable that moves a folder, if nothing can be written there."""
    place = disk_of(folder)[1]
    try:
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        raise PlatformError(
            f"{what} cannot be written to {folder} ({error.strerror}): set {variable} to a folder that can be written"
        ) from error
