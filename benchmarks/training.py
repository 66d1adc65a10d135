"""Measure one way to train, in its own process. `run.py` calls it for each way and collects the results.

a: TRL + PEFT + bitsandbytes with the article's arguments. b: Unsloth with the article's arguments. c: this project's plan."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
EPOCHS = 2  # the first warms up and compiles, the second is measured
T4_GIB = 14.5
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The arguments that the article passes to its trainer, by their current names.
ARTICLE = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "learning_rate": 2e-4,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "max_length": 2048,
}


def article_texts(rows: list[dict[str, str]], eos_token: str) -> list[str]:
    from medcot_utils.data.prompts import training_text

    return [training_text(row["Question"], row["Complex_CoT"], row["Response"], eos_token) for row in rows]


def variant_a(options: argparse.Namespace, rows: list[dict[str, str]]):
    """Return (trainer, tokens of all rows, description)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    dtype = torch.float32 if options.precision == "float32" else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=dtype, device_map={"": 0}, attn_implementation="sdpa"
    )
    torch.manual_seed(3407)
    if options.precision == "bfloat16":
        model.requires_grad_(False).enable_input_require_grads()
    else:  # this makes embedding and norms float32, and with them the values that pass from layer to layer
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    texts = article_texts(rows, tokenizer.eos_token)
    mixed = options.precision != "float32"
    arguments = ARTICLE | {"gradient_checkpointing": True, "bf16": mixed, "dataset_text_field": "text"}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common(options, len(rows), 8), **arguments),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    return trainer, count_tokens(tokenizer, texts), "2 rows x 4 micro-batches, gradient checkpointing"


def variant_b(options: argparse.Namespace, rows: list[dict[str, str]]):
    """Return (trainer, tokens of all rows, description)."""
    from datasets import Dataset
    from unsloth import FastLanguageModel, is_bfloat16_supported  # before trl, transformers, and peft

    import torch  # isort: skip
    from trl import SFTConfig, SFTTrainer  # isort: skip

    if options.as_on_a_t4:
        torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / torch.cuda.mem_get_info()[1])
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=2048,
        dtype=torch.float16 if options.as_on_a_t4 else None,
        load_in_4bit=True,
        use_exact_model_name=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=PROJECTIONS,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    texts = article_texts(rows, tokenizer.eos_token)
    bf16 = is_bfloat16_supported() and not options.as_on_a_t4
    arguments = ARTICLE | {"gradient_checkpointing": True, "bf16": bf16, "fp16": not bf16, "dataset_text_field": "text"}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common(options, len(rows), 8), **arguments),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    return trainer, count_tokens(tokenizer, texts), "2 rows x 4 micro-batches, unsloth checkpointing"


def variant_c(options: argparse.Namespace, rows: list[dict[str, str]]):
    """Return (trainer, tokens of all rows, description)."""
    from medcot_utils.config import load_config
    from medcot_utils.models.engine import get_engine

    settings = [f"model.name={options.model}", "training.eval_steps=null", f"dataset.path={options.rows}"]
    config = load_config("article", [*settings, *options.set])
    engine = get_engine(config.model)
    import torch
    from datasets import Dataset

    from medcot_utils import data
    from medcot_utils.training.trainer import make_sft_trainer, plan_training, prepare_trainer

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    model, tokenizer = engine.load(config.model)
    model = engine.add_lora(model, config.lora)
    texts = Dataset.from_list([{"id": str(index)} | row for index, row in enumerate(rows)])
    texts = data.add_text_column(texts, tokenizer.eos_token)
    tokenized, _ = data.tokenize_rows(texts, tokenizer, config.dataset, config.model.max_seq_length, False)
    plan = plan_training(engine, model, config, tokenized, processes)[0]
    steps = common(options, len(rows), config.training.effective_batch_size)["max_steps"]
    config = load_config("article", [*settings, *options.set, f"training.max_steps={steps}", "training.logging_steps=1"])
    trainer = make_sft_trainer(engine, model, tokenizer, config, plan, tokenized, tokenized, Path(options.work))
    trainer.args.save_strategy, trainer.args.disable_tqdm = "no", True
    prepare_trainer(trainer, config)
    return trainer, sum(map(len, tokenized["input_ids"])), str(plan)


def common(options: argparse.Namespace, rows: int, effective_batch: int) -> dict[str, Any]:
    steps = EPOCHS * (rows // effective_batch)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": options.work, "max_steps": steps, "logging_steps": 1} | quiet


def count_tokens(tokenizer, texts: list[str]) -> int:
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


def make_clock():
    """Return a callback that times the last pass over the rows as a whole, and the first step.

    It waits for the GPU only at the beginning and end of the pass, as training waits only where something is logged. So the first
    pass logs the loss of each step, and the last pass the mean of its losses."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.measured = state.max_steps // EPOCHS
            if state.global_step in (0, state.max_steps - self.measured):
                _wait(torch)
                self.began = time.perf_counter()
            if state.global_step == state.max_steps - self.measured:
                state.logging_steps = self.measured

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (1, state.max_steps):
                _wait(torch)
                seconds = time.perf_counter() - self.began
                setattr(self, "first_step" if state.global_step == 1 else "last_pass", seconds)

    return Clock()


def _wait(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile_step(trainer, folder: Path) -> dict[str, float]:
    """Return {kind of work: GPU seconds per step} and the wall time per step, from two more steps. Write the table to a file."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Profiler(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
                self.profile.__enter__()
                self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                torch.cuda.synchronize()
                self.wall = time.perf_counter() - self.began
                self.profile.__exit__(None, None, None)

    trainer.args.max_steps = 3
    profiler = Profiler()
    trainer.add_callback(profiler)
    trainer.train()
    averages = profiler.profile.key_averages()
    # Ranges that a library names, such as the optimizer's step, would count the kernels inside them again.
    on_gpu = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    kinds = {
        "attention": ("attention", "sdpa", "flash", "fmha"),  # first: flash attention's kernels name cutlass too
        "matrix products": ("nvjet", "gemm", "cutlass", "cublas"),
        "weights unpacked from 4 bits": ("dequant",),
        "optimizer": ("optimizer", "adam"),
    }
    spent = dict.fromkeys([*kinds, "everything else"], 0.0)
    for event in kernels:
        name = event.key.lower()
        kind = next((kind for kind, words in kinds.items() if any(word in name for word in words)), "everything else")
        spent[kind] += event.self_device_time_total / 1e6 / 2
    (folder / "profile.txt").write_text(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))
    return {kind: round(seconds, 4) for kind, seconds in spent.items()} | {"wall": round(profiler.wall / 2, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=["a", "b", "c"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="a .jsonl file with Question, Complex_CoT, Response")
    parser.add_argument("--num-rows", type=int, default=80)
    parser.add_argument("--work", required=True, help="a scratch folder")
    parser.add_argument("--out", required=True)
    parser.add_argument("--set", action="append", default=[], help="c only: a setting that overrides profile article")
    parser.add_argument(
        "--precision",
        choices=["as PEFT advises", "bfloat16", "float32"],
        default="as PEFT advises",
        help="a only; as PEFT advises: bfloat16, with embedding, norms, and so the values between the layers in float32",
    )
    parser.add_argument("--as-on-a-t4", action="store_true", help=f"b only: float16, {T4_GIB} GiB of GPU memory")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    began = time.perf_counter()
    with Path(options.rows).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: options.num_rows]
    keys = ("Question", "Complex_CoT", "Response")
    rows = [{key: row[key] for key in keys} for row in rows]
    trainer, tokens, description = {"a": variant_a, "b": variant_b, "c": variant_c}[options.variant](options, rows)
    import torch

    clock = make_clock()
    trainer.add_callback(clock)
    ready = time.perf_counter() - began
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    last_pass, steps, first_step = clock.last_pass, clock.measured, clock.first_step
    result = {
        "variant": options.variant,
        "settings": options.set,
        "what": description,
        "rows": len(rows),
        "tokens_per_epoch": tokens,
        "steps_per_epoch": steps,
        "rows_per_step": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size,
        "cards": trainer.args.world_size,
        "seconds_until_ready": round(ready, 1),
        "first_step_seconds": round(first_step, 2),
        "seconds_per_step": round(last_pass / steps, 4),
        "tokens_per_second": round(tokens / last_pass, 1),
        "losses": [round(float(entry["loss"]), 5) for entry in trainer.state.log_history if "loss" in entry],
        "skipped_steps": sum(entry.get("skipped_step", 0) for entry in trainer.state.log_history),
        "precision": "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32",
        "gradient_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "loss_scale": scaler.get_scale() if (scaler := trainer.accelerator.scaler) else None,
        "adapter_dtype": str(next(weight.dtype for weight in trainer.model.parameters() if weight.requires_grad)),
    }
    if torch.cuda.is_available():
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        result["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if packed := sys.modules.get("unsloth.utils.hf_packed_attention"):
        result["joined_rows_attention"] = dict(packed.HF_PACKED_ATTENTION_STATS)
    if trainer.is_world_process_zero():
        if options.profile:
            result["profile_seconds_per_step"] = profile_step(trainer, Path(options.out).parent)
        Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
