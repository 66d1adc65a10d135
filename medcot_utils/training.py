"""The SFT trainer: its arguments, resume from the last good checkpoint, live figure and progress, memory estimate."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils.notebook import NotebookProgressCallback

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTTrainer


class TrainingError(MedcotError):
    """Training cannot go on as planned; the message says what differs and what to do."""


def sft_arguments(config: RunConfig) -> dict[str, Any]:
    """The keyword arguments of `trl.SFTConfig` (but for output_dir), all that differ from its defaults or matter here."""
    import torch

    t, on_card = config.training, torch.cuda.is_available()
    bf16 = on_card and torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "per_device_train_batch_size": t.per_device_train_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
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
        "bf16": bf16,
        "fp16": on_card and not bf16,
        # TRL's defaults would put both back: checkpointing on, and rows clipped at 1,024 tokens without a word.
        "gradient_checkpointing": bool(config.lora.use_gradient_checkpointing),
        "max_length": None,
        # Rows come tokenized, with labels, from notebook 03.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_pin_memory": on_card,
        "report_to": "none",
    }


# --- resume --------------------------------------------------------------------------------------------------------


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, or None. One cut off in the middle of being written is set aside."""
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        print(f"{path.name} is not whole ({fault}): set aside, an earlier one is used")
        # Not a name that begins with `checkpoint-`: the trainer would count it, and remove a whole one in its stead.
        aside = path.with_name(f"broken-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return None


def checkpoint_fault(path: Path) -> str | None:
    """Why a trainer checkpoint with an adapter cannot be resumed from, or None if each of its files reads to the end."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(path / "adapter_model.safetensors", "pt") as tensors:
            if not tensors.keys():
                return "adapter_model.safetensors holds no tensors"
        optional = [name for name in ("rng_state.pth", "scaler.pt") if (path / name).exists()]
        for name in ("optimizer.pt", "scheduler.pt", *optional):
            with zipfile.ZipFile(path / name) as archive:
                if bad := archive.testzip():
                    return f"{name}: {bad} is damaged"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{type(error).__name__}: {Path(getattr(error, 'filename', None) or str(error)).name}"
    return None


def train(trainer: SFTTrainer) -> TrainOutput:
    """Train from the last good checkpoint in the trainer's output_dir, or from the start; says which."""
    output_dir = Path(trainer.args.output_dir)
    checkpoint = last_good_checkpoint(output_dir)
    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        print(f"resuming after step {state.global_step} of {state.max_steps} ({checkpoint.name})")
        if state.global_step >= state.max_steps:
            return _take_up(trainer, checkpoint, state)
    return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _take_up(trainer: SFTTrainer, checkpoint: Path, state: TrainerState) -> TrainOutput:
    # The Trainer itself would take one more step before it saw that there was none left.
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LossFigure):
            callback.on_log(trainer.args, state, trainer.control)
    return TrainOutput(state.global_step, float("nan"), {})


def check_effective_batch(trainer: SFTTrainer, config: RunConfig) -> int:
    """Rows per optimizer step. Raises TrainingError if it is not per-device batch x accumulation as configured: with two
    cards visible some stacks double it without a word."""
    planned = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    actual = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if actual != planned:
        raise TrainingError(
            f"each step would train on {actual} rows where {planned} were asked for ({trainer.args.n_gpu} cards visible): "
            f"set CUDA_VISIBLE_DEVICES=0"
        )
    return actual


def keep_lora_float32(trainer: SFTTrainer) -> None:
    """Undo TRL's cast of the LoRA matrices to bfloat16.

    SFTTrainer casts them when the base is quantized. Steps of 1e-3 and less are then rounded to 8 bits of mantissa, a card
    without bfloat16 (T4) cannot scale such gradients, and the article's engine, Unsloth, keeps them in float32."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


# --- what the reader sees ------------------------------------------------------------------------------------------


class TqdmProgress(TrainerCallback):
    """One progress bar over optimizer steps with the last loss beside it."""

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
    """The loss curve, drawn anew in the same place of the notebook at every logged step."""

    def __init__(self) -> None:
        self.handle = None

    def on_log(self, args, state, control, **kwargs):
        if any("loss" in entry for entry in state.log_history):
            self._draw(state.log_history)

    def _draw(self, log_history):
        from IPython.display import display

        from medcot_utils.plots import loss_figure

        figure = loss_figure(log_history)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


def prepare_trainer(trainer: SFTTrainer, config: RunConfig) -> SFTTrainer:
    """The trainer made ready: effective batch checked, LoRA matrices in float32, and a progress bar and a live loss
    figure in place of its printed dictionaries. Raises TrainingError if the effective batch is not the configured one."""
    print(f"{check_effective_batch(trainer, config)} rows per optimizer step")
    keep_lora_float32(trainer)
    for kind in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(TqdmProgress())
    trainer.add_callback(LossFigure())
    return trainer


# --- plan ----------------------------------------------------------------------------------------------------------


def step_plan(config: RunConfig, rows: int) -> dict[str, Any]:
    """{rows, effective_batch, steps, epochs}: optimizer steps and how often they pass over the rows."""
    t = config.training
    effective_batch = t.per_device_train_batch_size * t.gradient_accumulation_steps
    steps_per_epoch = math.ceil(rows / effective_batch)
    steps = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * steps_per_epoch)
    return {"rows": rows, "effective_batch": effective_batch, "steps": steps, "epochs": round(steps / steps_per_epoch, 2)}


def memory_estimate(model: PreTrainedModel, config: RunConfig, tokens_per_row: int) -> dict[str, float]:
    """MB that one training step needs, by part, for rows of `tokens_per_row` tokens.

    Activations without checkpointing: 34 bytes x tokens x hidden size x layers at 16 bits, after Korthikanti et al. 2022,
    "Reducing Activation Recomputation in Large Transformer Models", eq. 2 without its attention-score term (SDPA keeps no
    scores), doubled at float32; with checkpointing only each layer's input is kept. Logits: three float32 copies (the
    logits, their softmax, their gradient)."""
    import torch

    sizes, batch = model.config.get_text_config(), config.training.per_device_train_batch_size
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wide = 2 if model.dtype == torch.float32 else 1
    tokens = batch * tokens_per_row
    per_layer = 2 * wide if config.lora.use_gradient_checkpointing else 34 * wide
    optimizer = 2 if config.training.optim.endswith("8bit") else 8
    frozen = model.get_memory_footprint() - sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    parts = {
        "base weights": frozen,
        "LoRA weights (float32)": 4 * trainable,
        "LoRA gradients": 4 * trainable,
        "optimizer states": optimizer * trainable,
        "activations": per_layer * tokens * sizes.hidden_size * sizes.num_hidden_layers,
        "logits": 3 * 4 * tokens * sizes.vocab_size,
    }
    parts["total"] = sum(parts.values())
    return {name: round(size / 1e6, 1) for name, size in parts.items()}
