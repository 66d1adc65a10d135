"""The records of training in a run: plan.json and training_log.jsonl."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11


class StepPlan(TypedDict):
    """Hold how long a run trains: a part of plan.json."""

    rows: int  # training rows
    effective_batch: int  # rows per optimizer step
    steps: int  # optimizer steps
    epochs: float  # passes over the rows


class Plan(StepPlan):
    """Hold the content of plan.json, which notebook 04 records before training. Earlier runs lack the optional fields."""

    trainable_parameters: int
    total_parameters: int
    longest_row_tokens: NotRequired[int]
    memory_estimate_mb: NotRequired[dict[str, float]]  # {part: MB}
    batch_plan: NotRequired[str]
    plan_memory_mb: NotRequired[float]
    sft_arguments: NotRequired[dict[str, object]]


class LogEntry(TypedDict, total=False):
    """Hold one entry of the trainer's log (`TrainerState.log_history`): a line of training_log.jsonl.

    Every entry has a step and the numbers of one kind. TRL and Trainer may log further numbers."""

    step: int  # optimizer steps taken so far
    epoch: float
    loss: float  # on the training rows since the previous entry, nats per token
    learning_rate: float
    grad_norm: float
    eval_loss: float  # on the held-out rows, nats per token
    skipped_step: int  # 1 if GradScaler skipped the step
    train_loss: float  # at the end: mean over all steps, nats per token
    train_runtime: float  # at the end: seconds
