"""The batch plan: how an effective batch is split into micro-batches and processes, and how much memory that needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError
from medcot_utils.machine.hardware import count_gpus_alike
from medcot_utils.training.records import StepPlan

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

# Bytes of activations per token, hidden unit, and layer at 16 bits: Korthikanti et al. 2022, "Reducing Activation
# Recomputation in Large Transformer Models", eq. 2 without its attention-score term (SDPA keeps no scores).
_ACTIVATION_BYTES = 34
# Each micro-batch costs as much time as about this many extra tokens, for kernel launches and for unpacking 4-bit weights again.
# Measured by benchmarks/ on an 8B Llama on an H200. It only ranks plans.
_MICRO_BATCH_TOKENS = 1500
# Recomputing the forward pass takes six operations per weight and token instead of the four that LoRA needs.
_RECOMPUTE = 1.5
# The rest of the memory stays free for fragmentation and the libraries' workspaces.
_HEADROOM = 0.9


class PlanError(MedcotError):
    """Say that the effective batch cannot be trained here: what is needed, what is free, and what to do."""


@dataclass(frozen=True)
class BatchPlan:
    """Hold one way to split an optimizer step. All plans of a run train on the same rows in the same order."""

    per_device_train_batch_size: int  # rows of one micro-batch
    gradient_accumulation_steps: int  # micro-batches of one process per step
    num_processes: int
    gradient_checkpointing: Literal["unsloth"] | bool
    memory_mb: float  # estimated memory of a step in addition to the weights
    relative_cost: float  # time of a step, in tokens; it only ranks plans

    @property
    def effective_batch_size(self) -> int:
        """Return the rows per optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_processes

    def __str__(self) -> str:
        processes = f"{self.num_processes} processes x " if self.num_processes > 1 else ""
        checkpointing = f"{self.gradient_checkpointing} checkpointing" if self.gradient_checkpointing else "no checkpointing"
        shape = f"{self.per_device_train_batch_size} rows x {self.gradient_accumulation_steps} micro-batches"
        return f"{processes}{shape}, {checkpointing.replace('True', 'gradient')}"


def count_processes(config: RunConfig, gpus: int | None = None) -> int:
    """Return in how many processes to train: the setting or, with `auto`, the most that can share the effective batch evenly.

    `auto` uses one process per GPU of the same kind, and one process without a GPU. The number changes losses only by rounding,
    so a run's fingerprints leave it out.

    Args:
        gpus: the number of GPUs of another machine; None counts the GPUs of the same kind that are visible here."""
    t = config.training
    if t.num_processes != "auto":
        return t.num_processes
    most = max(1, count_gpus_alike() if gpus is None else gpus)
    return max(count for count in range(1, most + 1) if t.effective_batch_size % count == 0)


def memory_parts(
    model: PreTrainedModel, config: RunConfig, tokens: int, checkpointing: Literal["unsloth"] | bool, whole_logits: bool
) -> dict[str, float]:
    """Return the memory that one training step needs, in MB, by part and in total.

    Without checkpointing, activations need 34 bytes x tokens x hidden size x layers at 16 bits (Korthikanti et al. 2022, eq. 2),
    and twice that in float32. With checkpointing, they need twice those of one layer (recomputed, and their gradients) plus the
    input of every layer, which "unsloth" keeps in RAM. The logits need three float32 copies: logits, softmax, and gradient.

    Args:
        tokens: tokens of the largest micro-batch, including padding.
        checkpointing: the kind of gradient checkpointing, False for none.
        whole_logits: whether the engine computes the loss from all logits at once."""
    import torch

    sizes = model.config.get_text_config()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wide = 2 if model.dtype == torch.float32 else 1
    layer = _ACTIVATION_BYTES * wide * tokens * sizes.hidden_size
    if not checkpointing:
        activations = layer * sizes.num_hidden_layers
    else:
        inputs = 0 if checkpointing == "unsloth" else 2 * wide * tokens * sizes.hidden_size * sizes.num_hidden_layers
        activations = 2 * layer + inputs
    frozen = model.get_memory_footprint() - sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    parts = {
        "base weights": frozen,
        "LoRA weights (float32)": 4 * trainable,
        "LoRA gradients": 4 * trainable,
        "optimizer states": (2 if config.training.optim.endswith("8bit") else 8) * trainable,
        "activations": activations,
        "logits": 3 * 4 * tokens * sizes.vocab_size if whole_logits else 0,
    }
    parts["total"] = sum(parts.values())
    return {name: round(size / 1e6, 1) for name, size in parts.items()}


def padded_tokens(lengths: Sequence[int], rows: int) -> float:
    """Return the mean number of tokens of a micro-batch, with padding. Micro-batches hold `rows` rows, in the given order."""
    batches = [lengths[start : start + rows] for start in range(0, len(lengths) - rows + 1, rows)] or [lengths]
    return sum(len(batch) * max(batch) for batch in batches) / len(batches)


def batch_plans(
    model: PreTrainedModel,
    config: RunConfig,
    lengths: Sequence[int],
    whole_logits: bool,
    num_processes: int = 1,
    on_gpu: bool | None = None,
) -> list[BatchPlan]:
    """Return every way to split the effective batch, fastest first, whether or not it fits in memory.

    With `training.batch_plan: as_set`, and on a CPU, where larger micro-batches gain nothing, the settings give the only plan.

    Args:
        lengths: the number of tokens of each training row.
        whole_logits: whether the engine computes the loss from all logits at once.
        on_gpu: whether training runs on a GPU; by default, whether there is one.

    Raises:
        PlanError: if the processes cannot share the batch evenly."""
    import torch

    t, asked = config.training, config.lora.use_gradient_checkpointing
    if t.effective_batch_size % num_processes:
        raise PlanError(f"{num_processes} processes cannot evenly share an effective batch of {t.effective_batch_size} rows")
    share = t.effective_batch_size // num_processes
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if t.batch_plan == "as_set" or not on_gpu:
        per_device = min(t.per_device_train_batch_size, share)
        choices = [(per_device if share % per_device == 0 else math.gcd(per_device, share), asked)]
    else:
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        choices = [(size, checkpointing) for size in sizes for checkpointing in {False: None, asked: None}]
    plans = []
    for size, checkpointing in choices:
        parts = memory_parts(model, config, size * max(lengths), checkpointing, whole_logits)
        # The weights are already on the GPU when the plan is made.
        need = parts["total"] - parts["base weights"] - parts["LoRA weights (float32)"]
        tokens = padded_tokens(lengths, size) * (_RECOMPUTE if checkpointing else 1) + _MICRO_BATCH_TOKENS
        plans.append(BatchPlan(size, share // size, num_processes, checkpointing, round(need, 1), round(tokens * share / size)))
    return sorted(plans, key=lambda plan: plan.relative_cost)


def choose_plans(plans: Sequence[BatchPlan], free: float) -> list[BatchPlan]:
    """Return the plans to try in turn: the fastest that fits in `free` bytes with a tenth to spare, then ever smaller ones.

    Raises:
        PlanError: if none fits."""
    fitting = [plan for plan in plans if plan.memory_mb * 1e6 <= _HEADROOM * free]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.memory_mb)
        raise PlanError(
            f"a training step needs {smallest.memory_mb / 1e3:.1f} GB in addition to the weights even with {smallest}; "
            f"{free / 1e9:.1f} GB are free. Lower model.max_seq_length or lora.r, turn on lora.use_gradient_checkpointing, "
            f"or use a larger GPU"
        )
    chosen = [fitting[0]]
    for plan in sorted(plans, key=lambda plan: -plan.memory_mb):
        if plan.memory_mb < chosen[-1].memory_mb:
            chosen.append(plan)
    return chosen


def plans_table(plans: Sequence[BatchPlan], chosen: BatchPlan, weights_mb: float) -> pd.DataFrame:
    """Return a table of the plans: shape, estimated memory in GB (weights included), and time relative to the chosen plan.

    `weights_mb`: the memory of the weights, in MB."""
    import pandas as pd

    lines = [
        {
            "rows at once": plan.per_device_train_batch_size,
            "micro-batches": plan.gradient_accumulation_steps,
            "gradient checkpointing": str(plan.gradient_checkpointing),
            "memory (GB)": round((plan.memory_mb + weights_mb) / 1e3, 1),
            "relative time": round(plan.relative_cost / chosen.relative_cost, 2),
            "chosen": "yes" if plan == chosen else "",
        }
        for plan in plans
    ]
    return pd.DataFrame(lines)


def step_plan(config: RunConfig, rows: int) -> StepPlan:
    """Return the number of optimizer steps that a configuration takes over `rows` training rows."""
    t = config.training
    steps_per_epoch = math.ceil(rows / t.effective_batch_size)
    steps = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * steps_per_epoch)
    return {"rows": rows, "effective_batch": t.effective_batch_size, "steps": steps, "epochs": round(steps / steps_per_epoch, 2)}
