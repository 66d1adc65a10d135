"""Training with Unsloth on a real GPU: plans that agree, memory that was estimated, out of memory, float16."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from medcot_utils.models.tokenizer import load_tokenizer_from
from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.training.callbacks import skipped_steps
from medcot_utils.training.progress import read_peak


@pytest.fixture
def run_training(make_config, tokenized, tmp_path):
    """`run_training(config, plans)`: (losses by step, trainer); plans None: those that the GPU's memory chooses."""

    def run(config, plans=None, folder="checkpoints"):
        from medcot_utils.models.engine import get_engine

        engine = get_engine(config.model)
        from medcot_utils.training.trainer import make_sft_trainer, plan_training, train

        model, tokenizer = engine.load(config.model)
        model = engine.add_lora(model, config.lora)
        rows, held_out = tokenized(config, tokenizer)
        plans = plan_training(engine, model, config, rows) if plans is None else plans(engine, model, rows)

        def make_trainer(plan):
            return make_sft_trainer(engine, model, tokenizer, config, plan, rows, held_out, tmp_path / folder)

        trainer = train(make_trainer, plans, config)
        return {entry["step"]: float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry}, trainer

    yield run
    gc.collect()


def every_plan(config):
    from medcot_utils.training.batch_plan import batch_plans

    return lambda engine, model, rows: batch_plans(model, config, [len(ids) for ids in rows["input_ids"]], engine.WHOLE_LOGITS)


def one_plan(config, rows_at_once, checkpointing):
    def chosen(engine, model, rows):
        plans = every_plan(config)(engine, model, rows)
        shape = (rows_at_once, checkpointing)
        return [plan for plan in plans if (plan.per_device_train_batch_size, plan.gradient_checkpointing) == shape]

    return chosen


def test_unsloth_is_used_and_a_large_gpu_takes_all_rows_at_once(make_config, run_training):
    import sys

    import torch

    losses, trainer = run_training(make_config())
    assert "unsloth" in sys.modules
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (8, 1)
    assert not trainer.args.gradient_checkpointing
    peak = read_peak(Path(trainer.args.output_dir) / PROGRESS)
    assert peak["reserved"] == pytest.approx(torch.cuda.max_memory_reserved() / 1e6, rel=0.01)
    assert sorted(losses) == list(range(1, 9)) and losses[8] < losses[1]


def test_every_plan_gives_the_articles_losses_within_a_hundredth(make_config, run_training):
    config = make_config()
    article, _ = run_training(config, one_plan(config, 2, "unsloth"), "article")
    for number, (rows, checkpointing) in enumerate([(8, False), (4, False), (8, "unsloth"), (1, "unsloth")]):
        losses, _ = run_training(config, one_plan(config, rows, checkpointing), f"plan-{number}")
        assert losses == pytest.approx(article, rel=0.01)


def test_unpadded_rows_give_the_losses_of_padded_ones(make_config, run_training):
    padded, _ = run_training(make_config("training.padding=padded"), folder="padded")
    unpadded, trainer = run_training(make_config("training.padding=padding_free"), folder="unpadded")
    assert trainer.args.padding_free is True
    assert unpadded == pytest.approx(padded, rel=0.01)


def test_out_of_memory_takes_a_smaller_plan_and_loses_no_step(make_config, run_training, capsys):
    import torch

    config = make_config()
    expected, trainer = run_training(config, folder="expected")
    largest = torch.cuda.max_memory_reserved()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * largest / total)
    try:
        losses, trainer = run_training(config, every_plan(config), "capped")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory after step" in capsys.readouterr().out
    assert trainer.args.per_device_train_batch_size < 8 or trainer.args.gradient_checkpointing
    assert losses == pytest.approx(expected, rel=0.01)


def test_float16_counts_its_skipped_first_steps_and_then_learns(make_config, run_training):
    import torch

    config = make_config("model.dtype=float16", "training.max_steps=12")
    losses, trainer = run_training(config)
    assert trainer.args.fp16 and not trainer.args.bf16
    assert {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} == {torch.float32}
    assert 0 <= skipped_steps(trainer.state.log_history) <= 5
    assert losses[12] < losses[1]


def test_a_copy_with_bfloat16_states_trains_in_float16(wide_llama, make_config, run_training, tmp_path):
    """The Hub's pre-quantized copies have such states, and a T4 computes in float16."""
    import math

    import torch
    from transformers import AutoModelForCausalLM

    from medcot_utils.models.dequantized import four_bit_config

    quantization = four_bit_config(torch.bfloat16)
    copied = AutoModelForCausalLM.from_pretrained(
        wide_llama, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": 0}
    )
    assert copied.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.bfloat16
    copied.save_pretrained(tmp_path / "copy")
    load_tokenizer_from(wide_llama).save_pretrained(tmp_path / "copy")
    config = make_config(f"model.quantized_name={tmp_path / 'copy'}", "model.dtype=float16", "training.max_steps=20")
    losses, trainer = run_training(config)
    assert trainer.args.fp16 and trainer.accelerator.scaler.is_enabled()
    assert {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} == {torch.float32}
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    print(f"losses {losses}; gradient norms {norms}; skipped {skipped_steps(trainer.state.log_history)}")
    assert len(losses) == 20 and all(map(math.isfinite, losses.values())) and losses[20] < losses[1]
    assert skipped_steps(trainer.state.log_history) <= 5


def test_float16_that_overflows_at_every_step_ends_the_run(make_config, run_training, monkeypatch):
    from medcot_utils.training import trainer as module
    from medcot_utils.training.callbacks import SkippedStepsError

    config = make_config("model.dtype=float16", "training.max_steps=12")
    prepare = module.prepare_trainer

    def with_an_absurd_scale(trainer, *more):
        prepare(trainer, *more)
        trainer.accelerator.scaler._init_scale = 2.0**60
        return trainer

    monkeypatch.setattr(module, "prepare_trainer", with_an_absurd_scale)
    with pytest.raises(SkippedStepsError, match="6 of 6 optimizer steps were skipped"):
        run_training(config)
