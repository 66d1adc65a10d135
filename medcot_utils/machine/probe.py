"""This machine's speed: a matrix product, a copy, and small steps, measured within a few seconds."""

from __future__ import annotations

import itertools
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
_SMALL_STEPS = 20_000
_PARTS = 2  # on a busy machine, a pass is so much shorter, and there are so many more: some are hardly interrupted
_BUSY_LOAD = 1.5  # processes that ran in the last minute; one of them is the series' own
_BUSY_PERCENT = 30  # of all cores, by other programs, just before the probe: the load is slow to show a program that has begun


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
    busy: bool = False  # other programs used the processor meanwhile, and the CPU's rates are those without them

    @property
    def how(self) -> str:
        """Return where the numbers come from, in words."""
        if not self.measured:
            return "an estimate from published rates"
        return "by a probe of this machine" + (", which other programs slow now: alone, it takes less" if self.busy else "")


# Kaggle's two GPUs. `product` is what the public runs of medcot_utils/data/t4_reference.json come to: 60 steps of 8 rows of
# 769 tokens in 1,250 s, at the share of the product that an H100 held to a T4's memory reaches (series/estimate.py). `memory`
# is three quarters of the data sheet's 320 GB/s, `upload` half of PCIe 3.0 x16, `small_steps` that of a slow core: assumed.
KAGGLE_T4S = MachineSpeed("2 x Tesla T4", 2, 14.6, 30e12, 240e9, 6e9, 250e3, capability=(7, 5), measured=False)


@cache
def measure_speed() -> MachineSpeed:
    """Measure this machine, once in a process. Takes two or three seconds, and at most 1.5 GB of memory."""
    import torch

    gpus, busy = visible_gpus(), _is_busy()
    small = _count_per_second(_take_small_steps, _SMALL_STEPS, threads=1 if busy else None)
    if not gpus:
        cores = torch.get_num_threads()
        threads = _usable_threads() if busy else None
        product, memory = _measure_product(512, 1024, 4096, threads), _measure_weights(threads)
        return MachineSpeed(f"{cores} CPU cores", 0, 0.0, product, memory, 1.0, small, busy=busy)
    first = gpus[0]
    same = count_gpus_alike()
    product, memory, upload = _measure_product(4096, 4096, 4096), _measure_copy(), _measure_upload()
    release_gpu_memory()
    where = first.name if same == 1 else f"{same} x {first.name}"
    return MachineSpeed(where, same, first.memory_gib, product, memory, upload, small, first.capability, busy=busy)


def _is_busy() -> bool:
    return psutil.getloadavg()[0] > _BUSY_LOAD or psutil.cpu_percent(interval=0.3) > _BUSY_PERCENT


def _usable_threads() -> int:
    """Return how many threads can compute at once: those of torch, but no more than a container may use."""
    import joblib
    import torch

    return min(torch.get_num_threads(), joblib.cpu_count())


def _count_per_second(work: Callable[[], object], amount: float, threads: int | None = None) -> float:
    """Return how much of an amount is done per second, the fastest of a few times.

    Args: threads: how many threads share the work on a busy machine. A pass then takes the processor's time of each thread,
        which leaves out the time that other programs had. None: time by the clock."""
    work()
    seconds = []
    for _ in range(_TIMES * (_PARTS if threads else 1)):
        began, used = time.perf_counter(), time.process_time()
        work()
        clock, used = time.perf_counter() - began, time.process_time() - used
        seconds.append(min(clock, used / threads) if threads else clock)
    return amount / min(seconds)


def _take_small_steps() -> None:
    import torch

    one = torch.zeros(1)
    for _ in range(_SMALL_STEPS):
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


def _measure_product(rows: int, width: int, out: int, threads: int | None = None) -> float:
    import torch

    device, dtype = _device_and_dtype()
    left, right = torch.ones(rows, width, device=device, dtype=dtype), torch.ones(width, out, device=device, dtype=dtype)
    turns = 20 if device == "cuda" else 4 // (_PARTS if threads else 1)

    def multiply() -> None:
        for _ in range(turns):
            left @ right
        _wait()

    return _count_per_second(multiply, turns * 2.0 * rows * width * out, threads)


def _measure_weights(threads: int | None) -> float:
    """Return the bytes of float32 weights that a CPU multiplies with one row per second: more than its own cache holds."""
    import torch

    weights = [torch.ones(1024, 2048) for _ in range(64)]
    row, size = torch.ones(1, 2048), sum(one.numel() * 4 for one in weights)
    parts = itertools.cycle([weights[part::_PARTS] for part in range(_PARTS)] if threads else [weights])
    return _count_per_second(lambda: [row @ one.T for one in next(parts)], size / (_PARTS if threads else 1), threads)


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
