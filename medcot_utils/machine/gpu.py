"""The GPUs that this process uses, itself or through others that it starts, and their memory."""

from __future__ import annotations

import gc
import math
import sys
from typing import TypedDict


class PeakMemory(TypedDict):
    """The most GPU memory that a process has held; in a run's manifest in MB."""

    allocated: int  # by tensors
    reserved: int  # by torch, with what it keeps for later tensors


_lent: set[int] = set()  # GPUs of the processes that this one has started
# Bytes: the peaks before torch's own were reset, and those of processes that this one has started.
_before: PeakMemory = {"allocated": 0, "reserved": 0}


def release_gpu_memory() -> None:
    """Release the GPU memory that nothing uses anymore.

    PEFT's and accelerate's wrappers hold a model in a reference cycle: after `del model` its memory stays taken until the
    garbage collector finds the cycle."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def available_gpu_memory() -> float:
    """Return the bytes that this process can still take on its GPU, including those it holds unused; infinite without a GPU.

    In a group of processes, return the least of any."""
    import torch

    if not torch.cuda.is_available():
        return math.inf
    release_gpu_memory()
    least = _available_memory(torch.cuda.current_device())
    if torch.distributed.is_initialized():
        everywhere = torch.tensor(least, dtype=torch.float64, device="cuda")
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        least = everywhere.item()
    return least


def available_memory_of_gpus() -> list[float]:
    """Return the bytes that this process can still take on each visible GPU; an empty list without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    release_gpu_memory()
    return [_available_memory(index) for index in range(torch.cuda.device_count())]


def _available_memory(index: int) -> float:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return min(free, torch.cuda.get_per_process_memory_fraction(index) * total - torch.cuda.memory_reserved(index))


def reset_peak_gpu_memory() -> None:
    """Let torch's own peaks start from what is held now; `peak_gpu_memory_mb` remembers the earlier ones."""
    import torch

    if torch.cuda.is_available():
        _before.update(_peaks())
        torch.cuda.reset_peak_memory_stats()


def peak_gpu_memory_mb(since_reset: bool = False) -> PeakMemory | None:
    """Return the most GPU memory that this process or one whose peak it has noted has held, in MB; None if it used no GPU.

    Args: since_reset: only that of this process, since `reset_peak_gpu_memory`."""
    if "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized():
        return None
    return {kind: round(peak / 1e6) for kind, peak in (_own_peaks() if since_reset else _peaks()).items()}


def _own_peaks() -> PeakMemory:
    import torch

    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def _peaks() -> PeakMemory:
    return {kind: max(peak, _before[kind]) for kind, peak in _own_peaks().items()}


def note_peak(peak: PeakMemory | None) -> None:
    """Note the most memory (MB) of one GPU that a process which this one has started has held; None: it used no GPU."""
    for kind, mb in (peak or {}).items():
        _before[kind] = max(_before[kind], mb * 1_000_000)


def note_use(*gpus: int) -> None:
    """Note that a process which this one has started uses these GPUs, by their numbers among the visible ones."""
    _lent.update(gpus)


def describe_used_gpus() -> str:
    """Return one line on the GPUs that this process and those it started have used; empty if none."""
    if "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized():
        return ""
    import torch

    own = {index for index in range(torch.cuda.device_count()) if torch.cuda.memory_stats(index).get("allocation.all.allocated")}
    names = {index: torch.cuda.get_device_name(index) for index in sorted(own | _lent)}
    return f"GPUs used: {', '.join(f'{index} ({name})' for index, name in names.items())}" if names else ""
