"""The SFT trainer: its arguments, resuming from the last good checkpoint, and falling back to plans that need less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.utils.notebook import NotebookProgressCallback

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError
from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.gpu import available_gpu_memory, release_gpu_memory, reset_peak_gpu_memory
from medcot_utils.machine.heap import return_large_blocks
from medcot_utils.models.engine import compute_dtype
from medcot_utils.models.joined_rows import JoinedRows
from medcot_utils.models.losses import uncompiled
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.run.clock import TimeBudgetReached
from medcot_utils.training.batch_plan import BatchPlan, batch_plans, choose_plans
from medcot_utils.training.callbacks import (
    FiniteLoss,
    LossFigure,
    SkippedSteps,
    TimeBudget,
    TqdmProgress,
    TrackLog,
    WithoutTokenCount,
)
from medcot_utils.training.checkpoints import checkpoint_fault, last_good_checkpoint
from medcot_utils.training.progress import ProgressFile

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

    from medcot_utils.models.engine import Engine


class TrainingError(MedcotError):
    """Say why training cannot continue as planned, and what to do."""


def sft_arguments(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """Return the keyword arguments of `trl.SFTConfig` that differ from its defaults or matter here, except output_dir."""
    import torch

    t, on_gpu = config.training, torch.cuda.is_available()
    dtype = compute_dtype(config.model)
    return {
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "per_device_eval_batch_size": t.per_device_eval_batch_size,
        "warmup_steps": t.warmup_steps,
        "max_steps": t.max_steps,
        "num_train_epochs": t.num_train_epochs,
        "learning_rate": t.learning_rate,
        "optim": t.optim,
        "weight_decay": t.weight_decay,
        "lr_scheduler_type": t.lr_scheduler_type,
        "logging_steps": t.logging_steps,
        "save_strategy": "steps",
        "save_steps": t.save_steps,
        "save_total_limit": t.save_total_limit,
        "eval_strategy": "steps" if t.eval_steps else "no",
        "eval_steps": t.eval_steps,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": on_gpu and dtype == torch.bfloat16,
        "fp16": on_gpu and dtype == torch.float16,
        # TRL's default would turn it back on.
        "gradient_checkpointing": bool(plan.gradient_checkpointing),
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        # True waits for the GPU at every step, and logs the average of earlier losses instead of a loss that is not finite.
        "logging_nan_inf_filter": False,
        "report_to": "none",
    } | ({"ddp_find_unused_parameters": False} if plan.num_processes > 1 else {})


def explain_arguments(arguments: Mapping[str, Any]) -> pd.DataFrame:
    """Return a table of arguments of `trl.SFTConfig`: the value of each, and the first sentence of its help."""
    import pandas as pd
    from trl import SFTConfig

    helps = {name: str(SFTConfig.__dataclass_fields__[name].metadata.get("help") or "") for name in arguments}
    said = {name: text.replace("%%", "%").split(". ")[0].rstrip(".") for name, text in helps.items()}
    return pd.DataFrame({"SFTConfig": {name: str(value) for name, value in arguments.items()}, "in TRL's words": said})


# --- resume --------------------------------------------------------------------------------------------------------


def train(
    make_trainer: Callable[[BatchPlan], SFTTrainer],
    plans: Sequence[BatchPlan],
    config: RunConfig,
    callbacks: Sequence[TrainerCallback] = (),
    loss_before: float | None = None,
) -> SFTTrainer:
    """Train to the end from the last good checkpoint in the trainer's output_dir, or from the start, and say which.

    If the GPU runs out of memory, the finished steps are saved, and training resumes with the next plan, which needs less.

    Args:
        make_trainer: makes a trainer for a plan, as notebook 05 shows.
        plans: the batch plans to try in turn.
        callbacks: added to each trainer, such as those of `make_tracking_callbacks`.
        loss_before: the loss on the trainer's held-out rows before training (nats per token), drawn at step 0.

    Returns:
        The trainer that finished.

    Raises:
        DiskError: if there is no room for a checkpoint; the previous one stays whole.
        TimeBudgetReached: if the training stopped, with a checkpoint, before training.max_hours ended.
        TrainingError: if the effective batch is not the configured one, or if `plans` is empty.
        RuntimeError: the GPU's own error, if the last plan runs out of memory too."""
    from accelerate.utils.memory import should_reduce_batch_size

    for plan, smaller in zip(plans, [*plans[1:], None], strict=True):
        trainer = prepare_trainer(make_trainer(plan), config, loss_before)
        progress = Path(trainer.args.output_dir) / PROGRESS
        several = trainer.args.world_size > 1
        for callback in (ProgressFile(progress, str(plan) if several else None), *callbacks):
            trainer.add_callback(callback)
        reset_peak_gpu_memory()
        try:
            with full_disk_told("a checkpoint", Path(trainer.args.output_dir)), return_large_blocks():
                _train_or_resume(trainer)
            return trainer
        except RuntimeError as error:
            # If only one of several processes ran out, all must end; `train_in_processes` resumes with a smaller plan.
            if smaller is None or several or not should_reduce_batch_size(error):
                _end_tracking(trainer)
                raise
        except Exception:
            _end_tracking(trainer)
            raise
        # This is outside the except block, whose traceback would keep the activations alive.
        say(f"out of memory after step {trainer.state.global_step} with {plan}: continuing from there with {smaller}")
        _keep_finished_steps(trainer)
        del trainer
    raise TrainingError("no batch plan was given")


def _end_tracking(trainer: SFTTrainer) -> None:
    """Send the log of a failed training, and close the tracked run's session."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackLog):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _train_or_resume(trainer: SFTTrainer) -> None:
    import torch

    with trainer.args.main_process_first(local=False):  # the first sets broken checkpoints aside before the others look
        checkpoint = last_good_checkpoint(Path(trainer.args.output_dir), _trained_shapes(trainer))
    if trainer.args.device.type == "cpu":
        # In several processes the trainer would load its optimizer to "cpu:0", which torch refuses.
        trainer.args.__dict__["_setup_devices"] = torch.device("cpu")
    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if trainer.is_world_process_zero():
            say(f"resuming after step {state.global_step} of {state.max_steps} ({checkpoint.name})")
        if state.global_step >= state.max_steps:
            _restore_finished(trainer, checkpoint, state)
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    budgets = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TimeBudget)]
    if any(budget.stopped for budget in budgets):
        raise TimeBudgetReached(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, before training.max_hours ended; "
            f"a checkpoint is saved, and the same command or notebook resumes from it"
        )


def _trained_shapes(trainer: SFTTrainer) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in trainer.model.parameters() if parameter.requires_grad]


def _restore_finished(trainer: SFTTrainer, checkpoint: Path, state: TrainerState) -> None:
    # Trainer.train would take one more step before it noticed that none was left.
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LossFigure):
            callback.draw(state.log_history)


def _keep_finished_steps(trainer: SFTTrainer) -> None:
    """Save the state after the last finished step, and release the trainer's GPU memory.

    Memory runs out in the forward or backward pass, before the optimizer, whose states are small. So a step that ran out has
    changed no weights, and nothing needs to be undone."""
    trainer.model.zero_grad(set_to_none=True)
    saved = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if trainer.state.global_step > 0 and checkpoint_fault(saved) is not None:
        trainer._save_checkpoint(trainer.model, trial=None)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    release_gpu_memory()


# --- prepare -------------------------------------------------------------------------------------------------------


def keep_to_one_gpu(trainer: SFTTrainer) -> None:
    """Make the trainer use one GPU even if it sees several.

    By default, Trainer gives each GPU a whole per-device batch (DataParallel), so two GPUs silently double the batch."""
    if trainer.args.n_gpu > 1:
        trainer.args._n_gpu = 1
        trainer._train_batch_size = trainer.args.train_batch_size


def check_effective_batch(trainer: SFTTrainer, config: RunConfig) -> int:
    """Return the number of rows per optimizer step. Raise TrainingError if it is not the configured effective batch."""
    planned = config.training.effective_batch_size
    actual = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if actual != planned:
        raise TrainingError(
            f"each step would train on {actual} rows instead of {planned} ({trainer.args.n_gpu} GPUs visible): "
            f"set CUDA_VISIBLE_DEVICES=0"
        )
    return actual


def keep_lora_float32(trainer: SFTTrainer) -> None:
    """Undo TRL's cast of the LoRA matrices to bfloat16.

    SFTTrainer casts them if the base is quantized. Then steps of 1e-3 and less are rounded to 8 bits of mantissa, and a GPU
    without bfloat16 (T4) cannot scale such gradients. The article's engine, Unsloth, keeps the matrices in float32."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def update_jointly(trainer: SFTTrainer) -> None:
    """Make 8-bit AdamW update all LoRA matrices at once. Values and checkpoints stay the same."""
    from medcot_utils.training.joined_update import JoinedAdamW8bit

    args = trainer.args
    if args.optim in ("adamw_8bit", "adamw_bnb_8bit"):
        betas = args.adam_beta1, args.adam_beta2
        arguments = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = JoinedAdamW8bit, arguments


def prepare_trainer(trainer: SFTTrainer, config: RunConfig, loss_before: float | None = None) -> SFTTrainer:
    """Prepare a trainer in place, and return it.

    The trainer then uses one GPU, keeps LoRA matrices in float32, updates them at once, and checks skipped steps, losses, and
    time. A progress bar and a live loss figure (`LossFigure`, with `loss_before` at step 0) replace printed dictionaries.

    Raises:
        TrainingError: if the effective batch is not the configured one."""
    keep_to_one_gpu(trainer)
    rows = check_effective_batch(trainer, config)
    keep_lora_float32(trainer)
    update_jointly(trainer)
    trainer.evaluate = uncompiled()(trainer.evaluate)
    for kind in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(kind)
    if isinstance(trainer.data_collator, JoinedRows):
        trainer.add_callback(WithoutTokenCount())
    trainer.add_callback(SkippedSteps(trainer.accelerator))
    trainer.add_callback(FiniteLoss())
    if config.training.max_hours:
        trainer.add_callback(TimeBudget(config.training.max_hours))
    if trainer.args.world_size == 1:
        say(f"{rows} rows per optimizer step")
        trainer.add_callback(TqdmProgress())
        trainer.add_callback(LossFigure(loss_before))
    return trainer


# --- without a notebook --------------------------------------------------------------------------------------------


def plan_training(
    engine: Engine, model: PreTrainedModel, config: RunConfig, rows: Dataset, processes: int = 1
) -> list[BatchPlan]:
    """Return the batch plans to try in turn for tokenized rows and the free GPU memory. Raise PlanError if none fits."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return choose_plans(batch_plans(model, config, lengths, engine.WHOLE_LOGITS, processes), available_gpu_memory())


def make_sft_trainer(
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    plan: BatchPlan,
    train_rows: Dataset,
    held_out_rows: Dataset,
    output_dir: Path,
) -> SFTTrainer:
    """Return TRL's trainer for a plan, over tokenized and labeled rows and the first `training.eval_rows` held-out rows."""
    from trl import SFTConfig, SFTTrainer

    engine.set_checkpointing(model, plan.gradient_checkpointing)
    columns, few = ["input_ids", "labels"], range(min(config.training.eval_rows, len(held_out_rows)))
    arguments = sft_arguments(config, plan) | engine.trainer_arguments(config.training, model)
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output_dir), **arguments),
        train_dataset=train_rows.select_columns(columns),
        eval_dataset=held_out_rows.select_columns(columns).select(few),
        processing_class=tokenizer,
        data_collator=engine.data_collator(model),
    )
