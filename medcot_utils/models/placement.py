"""Decide where the weights of an unquantized model go: to one GPU, to all of them, or in part to RAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psutil import virtual_memory

from medcot_utils.machine.gpu import available_memory_of_gpus

_WITH_ROOM = 1.25  # the weights, and a quarter more for computing


def count_weight_bytes(source: str | Path, dtype: str, revision: str | None = None) -> int:
    """Return the bytes that a model's weights need in `dtype`, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return getattr(torch, dtype).itemsize * sum(parameter.numel() for parameter in shapes.parameters())


def gib_needed(weights: int) -> float:
    """Return the GiB of memory that `weights` bytes of weights need, with room for computing."""
    return _WITH_ROOM * weights / 2**30


def fits_in_memory(weights: int) -> bool:
    """Return whether `weights` bytes of weights, with room for computing, fit in all GPUs together, or in RAM without a GPU."""
    return (sum(available_memory_of_gpus()) or virtual_memory().available) > _WITH_ROOM * weights


def place_weights(source: str | Path, dtype: str, revision: str | None = None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that place the weights.

    One GPU holds all weights if they fit. If not, several GPUs share them. Weights that do not fit stay in RAM."""
    free = available_memory_of_gpus()
    if not free:
        return {}
    weights = count_weight_bytes(source, dtype, revision)
    if free[0] > _WITH_ROOM * weights:
        return {"device_map": {"": 0}}
    working = (_WITH_ROOM - 1) * weights / len(free)
    room = {index: max(0, int(there - working)) for index, there in enumerate(free)}
    return {"device_map": "auto", "max_memory": {**room, "cpu": virtual_memory().available}}
