"""The records of a training in a run: plan.json and training_log.jsonl."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11


class StepPlan(TypedDict):
    """How long a run trains; part of its plan.json."""

    rows: int  # training rows
    effective_batch: int  # rows per optimizer step
    steps: int  # optimizer steps
    epochs: float  # passes over the rows


class Plan(StepPlan):
    """The record of notebook 04 before the training: plan.json. Earlier runs lack the fields that may be missing."""

    trainable_parameters: int
    total_parameters: int
    longest_row_tokens: NotRequired[int]
    memory_estimate_mb: NotRequired[dict[str, float]]  # {part: MB}
    batch_plan: NotRequired[str]
    plan_memory_mb: NotRequired[float]
    sft_arguments: NotRequired[dict[str, object]]


class LogEntry(TypedDict, total=False):
    """One entry of the trainer's log (`TrainerState.log_history`), stored in a run as a line of training_log.jsonl.

    Every entry has a step, and the numbers of one kind beside it; there may be others, as TRL and Trainer log them."""

    step: int  # optimizer steps taken so far
    epoch: float
    loss: float  # of the training rows since the entry before, nats per token
    learning_rate: float
    grad_norm: float
    eval_loss: float  # of the held-out rows, nats per token
    skipped_step: int  # 1 if GradScaler skipped the step
    train_loss: float  # at the end: mean over all steps, nats per token
    train_runtime: float  # at the end: seconds
