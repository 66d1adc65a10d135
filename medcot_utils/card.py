"""The memory of this process's card."""

from __future__ import annotations

import gc
import math


def release_card_memory() -> None:
    """Give back what nobody uses any more. PEFT's and accelerate's wrappers hold a model in a circle: after `del model` its
    memory is still taken until the circle is found."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def free_card_memory() -> float:
    """Bytes that this process can still take on its card, what it holds unused counted in; infinite without a card. In a
    group of processes: the least of any."""
    import torch

    if not torch.cuda.is_available():
        return math.inf
    release_card_memory()
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    least = min(free, allowed)
    if torch.distributed.is_initialized():
        everywhere = torch.tensor(least, dtype=torch.float64, device="cuda")
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        least = everywhere.item()
    return least
