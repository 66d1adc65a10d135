"""The GPUs that a pushed notebook can ask Kaggle for, and whether a run fits them."""

from __future__ import annotations

from dataclasses import dataclass

from medcot_utils.config import RunConfig, profile_needs
from medcot_utils.errors import MedcotError


class AcceleratorError(MedcotError):
    """Say that Kaggle has no such accelerator, or that the run does not fit it: which there are, or what to set."""


@dataclass(frozen=True)
class Accelerator:
    """Hold a machine shape of Kaggle with NVIDIA GPUs."""

    gpu: str
    count: int
    memory_gb: int  # of one GPU, as its maker states it; about a tenth less is usable
    bfloat16: bool  # whether the hardware computes it (compute capability 8.0 or newer); else float16
    given_to_all: bool  # if not, only participants of some competitions, or only Kaggle's staff, get it

    def describe(self) -> str:
        """Return GPUs, memory, and number format as text."""
        number = "bfloat16" if self.bfloat16 else "float16"
        return f"{self.count} x {self.gpu}, {self.memory_gb} GB each, {number}"


# The names are from docs/kernels.md of Kaggle's client, "Accelerators available as of Sep 2026", and from its pull request 1198:
# NvidiaTeslaT4 is the editor's "GPU T4 x2", and single T4s are no longer available. Memory and formats are from NVIDIA's data
# sheets. The series does not run on Kaggle's TPUs; NvidiaTeslaP100 was retired on September 15, 2026.
ACCELERATORS = {
    "NvidiaTeslaT4": Accelerator("T4", 2, 16, bfloat16=False, given_to_all=True),
    "NvidiaL4": Accelerator("L4", 4, 24, bfloat16=True, given_to_all=False),
    "NvidiaL4X1": Accelerator("L4", 1, 24, bfloat16=True, given_to_all=False),
    "NvidiaTeslaA100": Accelerator("A100", 1, 40, bfloat16=True, given_to_all=False),
    "NvidiaH100": Accelerator("H100", 1, 80, bfloat16=True, given_to_all=False),
    "NvidiaRtxPro6000": Accelerator("RTX PRO 6000", 1, 96, bfloat16=True, given_to_all=False),
}
DEFAULT = "NvidiaTeslaT4"
_USABLE_GIB = 0.9  # at least this much of each GB stated is usable: a T4 of 16 GB shows 14.7 GiB


def find_accelerator(name: str) -> Accelerator:
    """Return an accelerator by Kaggle's name. Raises AcceleratorError, which lists all of them, for an unknown name."""
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    if name == "NvidiaTeslaP100":
        raise AcceleratorError(f"machine_shape NvidiaTeslaP100: today's torch does not support that GPU; choose {DEFAULT}")
    known = ", ".join(f"{one} ({found.count} x {found.gpu})" for one, found in ACCELERATORS.items())
    raise AcceleratorError(f"no accelerator {name!r}: expected one of {known}")


def check_accelerator(name: str, config: RunConfig) -> Accelerator:
    """Return the accelerator if a run fits it.

    Raises AcceleratorError for an unknown name, or if the run's profile and settings need more memory, another number format, or
    more GPUs."""
    found = find_accelerator(name)
    needed, usable = profile_needs(config.profile).gpu_gib, found.memory_gb * _USABLE_GIB
    if needed is not None and usable < needed:
        raise AcceleratorError(
            f"profile {config.profile} needs a GPU with at least {needed:.0f} GiB, and {name} has {found.describe()} "
            f"({usable:.1f} GiB usable): choose another --accelerator or a smaller profile"
        )
    if config.model.dtype == "bfloat16" and not found.bfloat16:
        raise AcceleratorError(
            f"model.dtype is bfloat16, but {name} ({found.describe()}) computes it in software, many times slower: leave "
            f"model.dtype at auto, or set it to float16"
        )
    processes = config.training.num_processes
    if isinstance(processes, int) and processes > found.count:
        raise AcceleratorError(
            f"training.num_processes is {processes}, but {name} has {found.describe()}: each process needs its own GPU. Set "
            f"training.num_processes={found.count}"
        )
    return found
