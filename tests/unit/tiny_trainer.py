"""The trainer of notebook 05 over the tiny model and ten rows, for the tests of training."""

from __future__ import annotations

import json

from medcot_utils import data
from medcot_utils.config import load_config
from medcot_utils.models.engine import get_engine
from medcot_utils.training.batch_plan import BatchPlan
from medcot_utils.training.trainer import (
    make_sft_trainer,
    plan_training,
    train,
)

SETTINGS = ["training.max_steps=6", "training.save_steps=2", "training.eval_steps=null"]
CONFIG = load_config("smoke", SETTINGS)


def plan(rows=2, micro_batches=2, checkpointing=False):
    """A batch plan of the smoke profile's four rows per step; the numbers that only rank plans are made up."""
    return BatchPlan(rows, micro_batches, 1, checkpointing, memory_mb=10.0 * rows, relative_cost=1.0)


def trainer_maker(output_dir, config=CONFIG, change=lambda trainer, plan: None):
    """(make_trainer, plans) of notebook 05: tiny model in 4 bits, fresh LoRA, ten rows of the shipped cases.

    `change(trainer, plan)` may add to each trainer before it is made ready."""
    engine = get_engine(config.model)
    model, tokenizer = engine.load(config.model)
    rows = data.add_text_column(data.load_rows(config.dataset).select(range(10)), tokenizer.eos_token)
    rows, _ = data.tokenize_rows(rows, tokenizer, config.dataset, config.model.max_seq_length, True)
    model = engine.add_lora(model, config.lora)

    def make(plan):
        trainer = make_sft_trainer(engine, model, tokenizer, config, plan, rows, rows.select(range(2)), output_dir)
        change(trainer, plan)
        return trainer

    return make, plan_training(engine, model, config, rows)


def make_trainer(output_dir, config=CONFIG):
    """The trainer of notebook 05 before `prepare_trainer`."""
    make, plans = trainer_maker(output_dir, config)
    return make(plans[0])


def trained(output_dir, config=CONFIG, plans=None, change=lambda trainer, plan: None):
    """The trainer of notebook 05 after `train`, from the last good checkpoint in the folder or from the start."""
    make, planned = trainer_maker(output_dir, config, change)
    return train(make, plans or planned, config)


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def adapter_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) == 28
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def saved_state(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8"))
