"""This machine's speed: a matrix product, a copy, and small steps, measured within a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import psutil

from medcot_utils.machine.gpu import release_gpu_memory
from medcot_utils.machine.hardware import count_gpus_alike, visible_gpus

if TYPE_CHECKING:
    import torch

_TIMES = 8  # each is measured; the fastest counts, since other programs slow the others down
_BUSY_LOAD = 1.5  # processes that ran in the last minute; one of them is the series' own


@dataclass(frozen=True)
class MachineSpeed:
    """Hold a machine's work per second."""

    where: str  # as a reader knows it: `2 CPU cores`, `2 x Tesla T4`
    gpus: int  # 0: it computes on the CPU
    gpu_gib: float  # memory of each GPU
    product: float  # operations in a product of large matrices, in the dtype that training computes in
    memory: float  # bytes of weights read, from GPU memory or from RAM without a GPU
    upload: float  # bytes copied from RAM to a GPU
    small_steps: float  # small operations that one core starts, Python included
    capability: tuple[int, int] | None = None  # compute capability of the GPUs
    measured: bool = True  # here; else published or derived
    busy: bool = False  # other programs used the processor meanwhile

    @property
    def how(self) -> str:
        """Return where the numbers come from, in words."""
        if not self.measured:
            return "an estimate from published rates"
        return "by a probe of this machine" + (", which other programs slowed down" if self.busy else "")


# Kaggle's two GPUs. `product` is what the public runs of medcot_utils/data/t4_reference.json come to: 60 steps of 8 rows of
# 769 tokens in 1,250 s, at the share of the product that an H100 held to a T4's memory reaches (series/estimate.py). `memory`
# is three quarters of the data sheet's 320 GB/s, `upload` half of PCIe 3.0 x16, `small_steps` that of a slow core: assumed.
KAGGLE_T4S = MachineSpeed("2 x Tesla T4", 2, 14.6, 30e12, 240e9, 6e9, 250e3, capability=(7, 5), measured=False)


@cache
def measure_speed() -> MachineSpeed:
    """Measure this machine, once in a process. Takes two or three seconds, and at most 1.5 GB of memory."""
    import torch

    gpus, busy = visible_gpus(), psutil.getloadavg()[0] > _BUSY_LOAD
    small = _count_per_second(_take_small_steps, 20_000)
    if not gpus:
        cores = torch.get_num_threads()
        return MachineSpeed(
            f"{cores} CPU cores", 0, 0.0, _measure_product(512, 1024, 4096), _measure_weights(), 1.0, small, busy=busy
        )
    first = gpus[0]
    same = count_gpus_alike()
    product, memory, upload = _measure_product(4096, 4096, 4096), _measure_copy(), _measure_upload()
    release_gpu_memory()
    where = first.name if same == 1 else f"{same} x {first.name}"
    return MachineSpeed(where, same, first.memory_gib, product, memory, upload, small, first.capability, busy=busy)


def _count_per_second(work: Callable[[], object], amount: float) -> float:
    """Return how much of an amount is done per second, the fastest of a few times."""
    work()
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return amount / min(seconds)


def _take_small_steps() -> None:
    import torch

    one = torch.zeros(1)
    for _ in range(20_000):
        one.add_(1)


def _device_and_dtype() -> tuple[str, torch.dtype]:
    import torch

    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measure_product(rows: int, width: int, out: int) -> float:
    import torch

    device, dtype = _device_and_dtype()
    left, right = torch.ones(rows, width, device=device, dtype=dtype), torch.ones(width, out, device=device, dtype=dtype)
    turns = 20 if device == "cuda" else 4

    def multiply() -> None:
        for _ in range(turns):
            left @ right
        _wait()

    return _count_per_second(multiply, turns * 2.0 * rows * width * out)


def _measure_weights() -> float:
    """Return the bytes of float32 weights that a CPU multiplies with one row per second: more than its own cache holds."""
    import torch

    weights = [torch.ones(1024, 2048) for _ in range(64)]
    row = torch.ones(1, 2048)
    return _count_per_second(lambda: [row @ one.T for one in weights], sum(one.numel() * 4 for one in weights))


def _measure_copy() -> float:
    import torch

    source = torch.ones(2**27, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(10):
            target.copy_(source)
        _wait()

    return _count_per_second(copy, 10 * 2.0 * source.numel() * 4)  # read and written


def _measure_upload() -> float:
    import torch

    source, target = torch.ones(2**26), torch.ones(2**26, device="cuda")

    def upload() -> None:
        target.copy_(source)
        _wait()

    return _count_per_second(upload, source.numel() * 4.0)
