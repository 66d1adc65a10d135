"""The memory of this process's GPU."""

from __future__ import annotations

import gc
import math
import sys

_before = {"allocated": 0, "reserved": 0}  # bytes: the peaks before measuring began anew


def release_gpu_memory() -> None:
    """Give back what nobody uses any more. PEFT's and accelerate's wrappers hold a model in a circle: after `del model` its
    memory is still taken until the circle is found."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def free_gpu_memory() -> float:
    """Bytes that this process can still take on its GPU, what it holds unused counted in; infinite without a GPU. In a
    group of processes: the least of any."""
    import torch

    if not torch.cuda.is_available():
        return math.inf
    release_gpu_memory()
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    least = min(free, allowed)
    if torch.distributed.is_initialized():
        everywhere = torch.tensor(least, dtype=torch.float64, device="cuda")
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        least = everywhere.item()
    return least


def measure_anew() -> None:
    """Let torch's own peaks start from what is held now. `peak_gpu_memory_mb` still knows the earlier ones."""
    import torch

    if torch.cuda.is_available():
        _before.update(_peaks())
        torch.cuda.reset_peak_memory_stats()


def peak_gpu_memory_mb() -> dict[str, int] | None:
    """{allocated, reserved}: the most that this process has held of its GPU, in MB; None if it has not used one."""
    if "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized():
        return None
    return {kind: round(peak / 1e6) for kind, peak in _peaks().items()}


def _peaks() -> dict[str, int]:
    import torch

    now = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {kind: max(peak, _before[kind]) for kind, peak in now.items()}
