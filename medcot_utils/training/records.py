"""The records of training in a run: plan.json, training_log.jsonl, and progress.jsonl beside the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.machine.gpu import PeakMemory
from medcot_utils.text_files import parse_json


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


class ProgressLine(TypedDict):
    """Hold a line of progress.jsonl."""

    step: int  # optimizer steps taken so far
    max_steps: int
    plan: NotRequired[str]  # only in the first line of several processes: how they split a step
    log_history: NotRequired[list[LogEntry]]  # only with several processes, when training begins or something is logged
    peak_gpu_memory_mb: NotRequired[PeakMemory]  # of the first process since its training began; not without a GPU


def read_line(line: str) -> ProgressLine | None:
    """Return what a line of progress.jsonl holds; None for any other line, such as half a one that a killed process left before
    the next."""
    try:
        state = parse_json(line)
    except ValueError:
        return None
    is_ours = isinstance(state, dict) and all(isinstance(state.get(name), int) for name in ("step", "max_steps"))
    return state if is_ours else None


def read_last(path: Path) -> ProgressLine | None:
    """Return what the last whole line of progress.jsonl holds; None if there is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    return next(filter(None, map(read_line, reversed(lines[:-1]))), None)
