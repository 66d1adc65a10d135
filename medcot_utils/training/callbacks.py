"""Trainer callbacks: bar and figure, skipped steps, tracking, and the time limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from transformers import TrainerCallback

from medcot_utils.errors import MedcotError
from medcot_utils.run.clock import SessionClock
from medcot_utils.training.records import LogEntry

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.training.tracking import Session

MAX_SKIPPED_STEPS = 5


class SkippedStepsError(MedcotError):
    """Say that GradScaler skipped more steps than is usual at the start."""


class DivergedError(MedcotError):
    """Say that a loss was not finite, so that the weights are not either."""


class WithoutTokenCount(TrainerCallback):
    """Remove TRL's token count from the log. TRL sums the attention mask, and the mask of joined rows is a square."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for entry in (logs or {}, state.log_history[-1] if state.log_history else {}):
            for name in ("num_tokens", "eval_num_tokens"):
                entry.pop(name, None)


class TqdmProgress(TrainerCallback):
    """Show one progress bar over optimizer steps, with the latest loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class LossFigure(TrainerCallback):
    """Show the loss curve, and redraw it in place at every logged step.

    `before`: the held-out loss before training (nats per token), drawn at step 0."""

    def __init__(self, before: float | None = None) -> None:
        self.handle, self.before = None, before

    def on_log(self, args, state, control, **kwargs):
        self.draw(state.log_history)

    def draw(self, log_history: Sequence[LogEntry]) -> None:
        """Show or update the figure; do nothing without a logged loss."""
        from IPython.display import display

        from medcot_utils.plots import loss_figure

        if not any("loss" in entry for entry in log_history):
            return
        figure = loss_figure(log_history, self.before)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


class SkippedSteps(TrainerCallback):
    """Count the optimizer steps that GradScaler skipped. In float16, it skips steps until its scale has come down.

    Each skipped step adds an entry `skipped_step` to the log, which checkpoints keep. The sixth is logged but not saved, and
    then SkippedStepsError is raised: such a run would train on far fewer steps than it reports."""

    def __init__(self, accelerator) -> None:
        self.accelerator = accelerator

    def on_step_end(self, args, state, control, **kwargs):
        if not self.accelerator.optimizer_step_was_skipped:
            return
        state.log_history.append({"step": state.global_step, "skipped_step": 1})
        if skipped_steps(state.log_history) > MAX_SKIPPED_STEPS:
            control.should_log, control.should_save, control.should_evaluate = True, False, False

    def on_step_begin(self, args, state, control, **kwargs):
        if (skipped := skipped_steps(state.log_history)) > MAX_SKIPPED_STEPS:
            raise SkippedStepsError(
                f"{skipped} of {state.global_step} optimizer steps were skipped because gradients overflowed in float16 (up to "
                f"{MAX_SKIPPED_STEPS} at the start are usual): lower training.learning_rate, look for rows with odd text, or "
                f"use a GPU with bfloat16"
            )

    on_train_end = on_step_begin  # for a step skipped at the very end


class FiniteLoss(TrainerCallback):
    """End training whose loss is not finite: its weights are not either, and no later step repairs them.

    The loss is logged but not saved, and then DivergedError is raised. In float16 GradScaler skips such steps, so the weights
    stay as they were, and `SkippedSteps` counts."""

    def __init__(self) -> None:
        self.diverged: float | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        # At the end, `train_loss` is the mean of all steps, those without a line in the log too.
        logged = [float(logs[name]) for name in ("loss", "train_loss") if name in (logs or {})]
        if not args.fp16 and not all(map(math.isfinite, logged)):
            self.diverged = logged[0]
            control.should_save, control.should_evaluate, control.should_training_stop = False, False, True

    def on_train_end(self, args, state, control, **kwargs):
        if self.diverged is not None:
            raise DivergedError(
                f"the training loss is {self.diverged} at step {state.global_step} instead of a finite number, so the adapter is "
                f"of no use: lower training.learning_rate (it is {args.learning_rate:g}), or look for rows with odd text"
            )


# {name in the log: its number format in the table}
_LOGGED = {"loss": ".4f", "eval_loss": ".4f", "grad_norm": ".3f", "learning_rate": ".2e"}


def skipped_steps(log_history: Sequence[LogEntry]) -> int:
    """Return how many optimizer steps GradScaler skipped, according to the trainer's log."""
    return sum(entry.get("skipped_step", 0) for entry in log_history)


def tabulate_log(log_history: Sequence[LogEntry]) -> pd.DataFrame:
    """Return a table of the logged losses, one line per step, with gradient norm and learning rate if they were logged.

    It is empty if no loss was logged."""
    import pandas as pd

    lines: dict[int, dict[str, object]] = {}
    for entry in log_history:
        if "loss" in entry or "eval_loss" in entry:
            shown = {name: f"{float(entry[name]):{digits}}" for name, digits in _LOGGED.items() if name in entry}
            lines.setdefault(entry["step"], {"step": entry["step"]}).update(shown)
    columns = [name for name in _LOGGED if any(name in line for line in lines.values())]
    return pd.DataFrame([*lines.values()], columns=["step", *columns]).set_index("step").fillna("")


class TrackLog(TrainerCallback):
    """Send the trainer's log to a tracker as it grows, from the first process only.

    `open_session` opens the session when training begins. The session stays open if a trainer runs out of memory and another
    one replaces it."""

    def __init__(self, open_session: Callable[[], Session]) -> None:
        self.open_session = open_session
        self.session: Session | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.session is None:
            self.session = self.open_session()
        self.on_log(args, state, control)

    def on_log(self, args, state, control, **kwargs):
        if self.session:
            self.session.send_log(state.log_history)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_log(args, state, control)
        if self.session:
            self.session.close()
            self.session = None


class TimeBudget(TrainerCallback):
    """Stop with a checkpoint when the session's clock says so, but after at least one step."""

    def __init__(self, max_hours: float) -> None:
        self.clock, self.stopped = SessionClock(max_hours), False

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.begin_piece()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.end_piece()
        if _any_process(self.clock.is_over(), args.device) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def _any_process(flag: bool, device) -> bool:
    # All processes must stop at the same step: the others would wait forever for one that stopped earlier.
    import torch

    if not torch.distributed.is_initialized():
        return flag
    everywhere = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
    return bool(everywhere.item())
