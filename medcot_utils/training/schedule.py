"""Check before training that the optimizer and the learning-rate schedule of the settings exist and can be made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from medcot_utils.config import TrainingSettings
from medcot_utils.errors import MedcotError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The profiles set these. They are known to work, so the check skips them: importing the trainer takes seconds.
PROVEN_OPTIMIZERS, PROVEN_SCHEDULES = ("adamw_torch", "adamw_8bit"), ("linear",)


class ScheduleError(MedcotError):
    """Say why an optimizer or a schedule cannot be made, and what to set."""


def check_schedule(settings: TrainingSettings) -> str:
    """Check optimizer and schedule, and return one line on them.

    Raises:
        ScheduleError: if transformers does not know a name, or if a name needs a missing package or argument."""
    optimizer, schedule = settings.optim, settings.lr_scheduler_type
    if optimizer not in PROVEN_OPTIMIZERS or schedule not in PROVEN_SCHEDULES:
        from transformers.trainer_utils import SchedulerType
        from transformers.training_args import OptimizerNames

        _require_known("training.optim", optimizer, [known.value for known in OptimizerNames])
        _require_known("training.lr_scheduler_type", schedule, [known.value for known in SchedulerType])
        arguments = _make_arguments(settings)
        _make_schedule(schedule)
        _make_optimizer(arguments)
    return f"optimizer {optimizer}, schedule {schedule}"


def _require_known(setting: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise ScheduleError(
            f"{setting}: unknown {name!r}; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
        )


def _make_arguments(settings: TrainingSettings) -> TrainingArguments:
    from transformers import TrainingArguments

    try:
        return TrainingArguments(
            optim=settings.optim,
            lr_scheduler_type=settings.lr_scheduler_type,
            learning_rate=settings.learning_rate,
            eval_strategy="steps" if settings.eval_steps else "no",
            eval_steps=settings.eval_steps,
            use_cpu=True,
            report_to="none",
        )
    except ValueError as error:
        raise ScheduleError(f"training: {_one_line(error)}") from error


def _make_schedule(name: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10)
    except (TypeError, ValueError) as error:  # it needs arguments that no setting provides
        raise ScheduleError(
            f"training.lr_scheduler_type {name} needs arguments that the series has no settings for ({_one_line(error)}): "
            f"choose another, such as linear or cosine"
        ) from error


def _make_optimizer(arguments: TrainingArguments) -> None:
    import torch
    from transformers import Trainer

    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
        make([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ScheduleError(
            f"training.optim {arguments.optim.value} cannot be made here ({_one_line(error)}): choose another, such as "
            f"adamw_torch"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
