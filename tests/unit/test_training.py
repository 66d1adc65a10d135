"""Training: the trainer's arguments, checkpoints that are whole and such that are not, resume, and the plan."""

from __future__ import annotations

import json
import shutil

import pytest

from medcot_utils import data
from medcot_utils.config import load_config
from medcot_utils.training import (
    TrainingError,
    check_effective_batch,
    checkpoint_fault,
    last_good_checkpoint,
    memory_estimate,
    prepare_trainer,
    sft_arguments,
    step_plan,
    train,
)

SETTINGS = ["training.max_steps=6", "training.save_steps=2", "training.eval_steps=null"]
CONFIG = load_config("smoke", SETTINGS)


def make_trainer(output_dir, config=CONFIG):
    """The trainer of notebook 05 before `prepare_trainer`: tiny model in 4 bits, fresh LoRA, rows of the shipped cases."""
    from medcot_utils.engines import get_engine

    engine = get_engine(config.model)
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = engine.load(config.model)
    rows = data.add_text_column(data.load_rows(config.dataset).select(range(10)), tokenizer.eos_token)
    rows, _ = data.tokenize_rows(rows, tokenizer, config.dataset, config.model.max_seq_length, True)
    return SFTTrainer(
        model=engine.add_lora(model, config.lora),
        args=SFTConfig(output_dir=str(output_dir), **sft_arguments(config)),
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def adapter_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder with checkpoint-4 and checkpoint-6, losses by step, adapter weights) of six real steps."""
    folder = tmp_path_factory.mktemp("trainer") / "checkpoints"
    trainer = prepare_trainer(make_trainer(folder), CONFIG)
    train(trainer)
    return folder, losses(trainer), adapter_weights(trainer)


@pytest.fixture
def checkpoints(uninterrupted, tmp_path):
    """A copy of the checkpoints that a test may break."""
    return shutil.copytree(uninterrupted[0], tmp_path / "checkpoints")


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["unsloth", "true", "false"])
def test_trls_defaults_for_row_length_and_checkpointing_are_overruled(asked, tmp_path):
    from trl import SFTConfig

    arguments = sft_arguments(load_config("smoke", [f"lora.use_gradient_checkpointing={asked}"]))
    assert arguments["max_length"] is None
    assert arguments["gradient_checkpointing"] is (asked != "false")
    made = SFTConfig(output_dir=str(tmp_path), **arguments)
    assert made.max_length is None and made.gradient_checkpointing is (asked != "false")


def test_settings_reach_the_trainers_arguments():
    changed = ["training.learning_rate=3e-4", "training.optim=adamw_8bit", "training.eval_steps=5", "seed=11"]
    arguments = sft_arguments(load_config("smoke", changed))
    assert (arguments["learning_rate"], arguments["optim"], arguments["seed"]) == (3e-4, "adamw_8bit", 11)
    assert (arguments["eval_strategy"], arguments["eval_steps"]) == ("steps", 5)
    assert sft_arguments(CONFIG)["eval_strategy"] == "no"
    assert arguments["report_to"] == "none", "nothing leaves this machine unasked"


# --- before training -----------------------------------------------------------------------------------------------


@pytest.mark.model
def test_lora_matrices_are_float32_when_training_begins(tmp_path):
    import torch

    trainer = prepare_trainer(make_trainer(tmp_path), CONFIG)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert len(trained) == 28
    assert {weight.dtype for weight in trained} == {torch.float32}


@pytest.mark.model
def test_an_effective_batch_that_differs_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    assert check_effective_batch(trainer, CONFIG) == 4
    with pytest.raises(TrainingError, match=r"4 rows where 8 were asked for.*CUDA_VISIBLE_DEVICES=0"):
        prepare_trainer(trainer, load_config("smoke", [*SETTINGS, "training.gradient_accumulation_steps=4"]))
    trainer.args.gradient_accumulation_steps = 1
    with pytest.raises(TrainingError, match="2 rows where 4"):
        check_effective_batch(trainer, CONFIG)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_training_moves_the_adapter_and_keeps_the_two_newest_checkpoints(uninterrupted):
    folder, by_step, weights = uninterrupted
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(by_step) == [1, 2, 3, 4, 5, 6]
    assert by_step[6] < by_step[1]
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name), "every B has moved from zero"


@pytest.mark.model
def test_the_newest_whole_checkpoint_is_chosen_by_its_step(checkpoints):
    assert last_good_checkpoint(checkpoints).name == "checkpoint-6"
    (checkpoints / "checkpoint-4").rename(checkpoints / "checkpoint-10")  # after 6 by number, before it by name
    assert last_good_checkpoint(checkpoints).name == "checkpoint-10"
    assert list(checkpoints.glob("broken*")) == []


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "missing") is None


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


FAULTS = {
    "adapter truncated": lambda path: truncate(path / "adapter_model.safetensors"),
    "adapter short of its last bytes": lambda path: truncate(path / "adapter_model.safetensors", 0.999),
    "adapter empty": lambda path: truncate(path / "adapter_model.safetensors", 0),
    "adapter missing": lambda path: (path / "adapter_model.safetensors").unlink(),
    "optimizer truncated": lambda path: truncate(path / "optimizer.pt"),
    "optimizer damaged inside": lambda path: flip_a_byte(path / "optimizer.pt"),
    "scheduler truncated": lambda path: truncate(path / "scheduler.pt"),
    "state missing": lambda path: (path / "trainer_state.json").unlink(),
    "state truncated": lambda path: truncate(path / "trainer_state.json"),
}


@pytest.mark.model
@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_set_aside_for_the_one_before(fault, checkpoints, capsys):
    assert checkpoint_fault(checkpoints / "checkpoint-6") is None
    FAULTS[fault](checkpoints / "checkpoint-6")
    assert last_good_checkpoint(checkpoints).name == "checkpoint-4"
    assert (checkpoints / "broken-checkpoint-6").is_dir() and not (checkpoints / "checkpoint-6").exists()
    said = capsys.readouterr().out
    assert "checkpoint-6 is not whole" in said and str(checkpoints) not in said, "no machine's folders in a notebook"
    assert last_good_checkpoint(checkpoints).name == "checkpoint-4", "and the next call does not stumble over it"


@pytest.mark.model
def test_a_checkpoint_broken_twice_at_the_same_step_is_set_aside_twice(checkpoints):
    for _ in range(2):
        truncate(checkpoints / "checkpoint-6" / "optimizer.pt")
        assert last_good_checkpoint(checkpoints).name == "checkpoint-4"
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-6")


@pytest.mark.model
def test_when_no_checkpoint_is_whole_training_starts_anew(checkpoints):
    for path in checkpoints.glob("checkpoint-*"):
        truncate(path / "optimizer.pt")
    assert last_good_checkpoint(checkpoints) is None
    assert len(list(checkpoints.glob("broken-*"))) == 2


def test_a_finished_run_is_taken_up_without_another_step(tmp_path, capsys):
    # Four of six steps: in the middle of an epoch, where the Trainer alone would take a fifth.
    config = load_config("smoke", ["training.max_steps=4", "training.save_steps=2", "training.eval_steps=null"])
    first = prepare_trainer(make_trainer(tmp_path, config), config)
    train(first)
    again = prepare_trainer(make_trainer(tmp_path, config), config)
    train(again)
    assert "resuming after step 4 of 4 (checkpoint-4)" in capsys.readouterr().out
    assert again.state.global_step == 4 and losses(again) == losses(first)
    weights, taken_up = adapter_weights(first), adapter_weights(again)
    assert all(taken_up[name].equal(weights[name]) for name in weights)


@pytest.mark.model
@pytest.mark.parametrize("newest", ["deleted", "truncated"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_did(newest, uninterrupted, checkpoints, capsys):
    _, by_step, weights = uninterrupted
    if newest == "deleted":
        shutil.rmtree(checkpoints / "checkpoint-6")
    else:
        truncate(checkpoints / "checkpoint-6" / "adapter_model.safetensors")
    trainer = prepare_trainer(make_trainer(checkpoints), CONFIG)
    train(trainer)
    assert "resuming after step 4 of 6 (checkpoint-4)" in capsys.readouterr().out
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    resumed = adapter_weights(trainer)
    assert resumed.keys() == weights.keys()
    assert max((resumed[name] - weights[name]).abs().max().item() for name in weights) <= 1e-6
    whole = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
    assert whole == ["checkpoint-4", "checkpoint-6"], "a broken one must not displace a whole one"
    state = json.loads((checkpoints / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 6


# --- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "rows", "expected"),
    [
        (["training.max_steps=6"], 12, {"rows": 12, "effective_batch": 4, "steps": 6, "epochs": 2.0}),
        (["training.max_steps=6"], 13, {"rows": 13, "effective_batch": 4, "steps": 6, "epochs": 1.5}),
        (["training.max_steps=-1"], 13, {"rows": 13, "effective_batch": 4, "steps": 4, "epochs": 1.0}),
        (["training.max_steps=-1", "training.num_train_epochs=2.5"], 12, {"effective_batch": 4, "steps": 8, "epochs": 2.67}),
        (["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"], 80, {"effective_batch": 8}),
    ],
)
def test_the_plan_counts_optimizer_steps_and_passes(overrides, rows, expected):
    plan = step_plan(load_config("smoke", overrides), rows)
    assert {key: plan[key] for key in expected} == expected


def test_the_articles_plan_is_60_steps_of_8_rows_which_is_not_one_pass_over_500():
    assert step_plan(load_config("article"), 500) == {"rows": 500, "effective_batch": 8, "steps": 60, "epochs": 0.95}


@pytest.mark.model
def test_the_planned_epoch_is_the_trainers_own(tmp_path):
    config = load_config("smoke", [*SETTINGS, "training.max_steps=-1", "training.num_train_epochs=1"])
    trainer = make_trainer(tmp_path, config)
    train(trainer)
    assert trainer.state.global_step == step_plan(config, len(trainer.train_dataset))["steps"] == 3


@pytest.mark.model
def test_the_memory_estimate_adds_up_and_checkpointing_lowers_it(tmp_path):
    model = make_trainer(tmp_path).model
    plain = memory_estimate(model, CONFIG, 500)
    assert plain["total"] == pytest.approx(sum(size for part, size in plain.items() if part != "total"), abs=0.5)
    # 28 matrices of 32,768 numbers in all, four bytes each.
    assert plain["LoRA weights (float32)"] == pytest.approx(4 * 32768 / 1e6, abs=0.05)
    saved = memory_estimate(model, load_config("smoke", [*SETTINGS, "lora.use_gradient_checkpointing=true"]), 500)
    assert saved["activations"] < plain["activations"]
    assert memory_estimate(model, CONFIG, 1000)["logits"] == pytest.approx(2 * plain["logits"], abs=0.1)
