"""Training: the trainer's arguments, whole and broken checkpoints, resume, and batch plans."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_trainer import (
    CONFIG,
    SETTINGS,
    adapter_weights,
    largest_difference,
    losses,
    make_trainer,
    plan,
    saved_state,
    trained,
)

from medcot_utils.config import load_config
from medcot_utils.models.engine import get_engine
from medcot_utils.models.losses import mean_loss, row_losses
from medcot_utils.training.batch_plan import step_plan
from medcot_utils.training.callbacks import LossFigure
from medcot_utils.training.trainer import (
    TrainingError,
    check_effective_batch,
    checkpoint_fault,
    explain_arguments,
    last_good_checkpoint,
    prepare_trainer,
    sft_arguments,
)

pytest_plugins = ("training_fixtures",)


# --- arguments -----------------------------------------------------------------------------------------------------


def test_each_argument_is_explained_in_trls_words():
    table = explain_arguments(sft_arguments(CONFIG, plan()) | {"padding_free": None, "dataset_kwargs": {}, "loss_type": "nll"})
    assert (table["in TRL's words"].str.len() > 15).all(), "a class that says nothing of an argument"
    assert table.loc["learning_rate"].tolist() == [str(CONFIG.training.learning_rate), "The initial learning rate for AdamW"]


@pytest.mark.parametrize("asked", ["unsloth", True, False])
@pytest.mark.model
def test_trls_length_and_checkpointing_defaults_are_overridden(asked, tmp_path):
    from trl import SFTConfig

    engine = get_engine(CONFIG.model)
    model, _ = engine.load(CONFIG.model)
    arguments = sft_arguments(CONFIG, plan(checkpointing=asked)) | engine.trainer_arguments(CONFIG.training, model)
    assert arguments["max_length"] is None
    assert arguments["gradient_checkpointing"] is bool(asked)
    made = SFTConfig(output_dir=str(tmp_path), **arguments)
    assert made.max_length is None and made.gradient_checkpointing is bool(asked)


def test_the_plan_and_not_the_settings_decides_the_micro_batches():
    arguments = sft_arguments(CONFIG, plan(1, 4))
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (1, 4)


def test_settings_reach_the_trainers_arguments():
    changed = ["training.learning_rate=3e-4", "training.optim=adamw_8bit", "training.eval_steps=5", "seed=11"]
    arguments = sft_arguments(load_config("smoke", changed), plan())
    assert (arguments["learning_rate"], arguments["optim"], arguments["seed"]) == (3e-4, "adamw_8bit", 11)
    assert (arguments["eval_strategy"], arguments["eval_steps"]) == ("steps", 5)
    assert sft_arguments(CONFIG, plan())["eval_strategy"] == "no"
    assert arguments["report_to"] == "none", "nothing leaves this machine unasked"


# --- before training -----------------------------------------------------------------------------------------------


@pytest.mark.model
def test_lora_matrices_are_float32_when_training_begins(tmp_path):
    trainer = prepare_trainer(make_trainer(tmp_path), CONFIG, loss_before=7.5)
    assert [one.before for one in trainer.callback_handler.callbacks if isinstance(one, LossFigure)] == [7.5]
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert len(trained) == 28
    assert {weight.dtype for weight in trained} == {torch.float32}


@pytest.mark.model
def test_the_loss_at_step_0_is_the_trainers_own_on_the_same_rows(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = trainer.eval_dataset.add_column("id", ["a", "b"])
    before = mean_loss(row_losses(trainer.model, rows, 2, "base"))
    assert before == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.model
def test_what_is_compiled_for_training_is_not_for_evaluation(tmp_path, monkeypatch):
    import torch

    trainer, compiled = prepare_trainer(make_trainer(tmp_path), CONFIG), []
    counting = torch.compile(trainer.model.forward, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    monkeypatch.setattr(trainer.model, "forward", counting)
    assert trainer.evaluate()["eval_loss"] > 0 and not compiled


@pytest.mark.model
def test_an_effective_batch_that_differs_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    assert check_effective_batch(trainer, CONFIG) == 4
    with pytest.raises(TrainingError, match=r"4 rows instead of 8.*CUDA_VISIBLE_DEVICES=0"):
        prepare_trainer(trainer, load_config("smoke", [*SETTINGS, "training.gradient_accumulation_steps=4"]))
    trainer.args.gradient_accumulation_steps = 1
    with pytest.raises(TrainingError, match="2 rows instead of 4"):
        check_effective_batch(trainer, CONFIG)


@pytest.mark.model
def test_one_of_two_gpus_is_used_and_the_batch_stays_simulated(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2  # what the Trainer counts, and what it then makes of its batch
    trainer._train_batch_size = trainer.args.train_batch_size
    with pytest.raises(TrainingError, match=r"8 rows instead of 4 \(2 GPUs visible\)"):
        check_effective_batch(trainer, CONFIG)
    assert trainer.get_train_dataloader().batch_sampler.batch_size == 4
    prepare_trainer(trainer, CONFIG)
    assert check_effective_batch(trainer, CONFIG) == trainer.get_total_train_batch_size(trainer.args) == 4
    assert trainer.get_train_dataloader().batch_sampler.batch_size == 2 and trainer.args.n_gpu == 1


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_training_changes_the_adapter_and_keeps_two_checkpoints(uninterrupted):
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


def change_state(path, **fields):
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    (path / "trainer_state.json").write_text(json.dumps(state | fields), encoding="utf-8")


def replace_torch(path, file, state):
    torch.save(state, path / file)


def change_random_state(path, **fields):
    torch.save(torch.load(path / "rng_state.pth", weights_only=False) | fields, path / "rng_state.pth")


def save_adapter_of(path, **weights):
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})


FAULTS = {
    "state of a newer transformers": lambda path: change_state(path, rows_seen=12),
    "state with text for a step": lambda path: change_state(path, global_step="6"),
    "state with a log of numbers": lambda path: change_state(path, log_history=[1, 2]),
    "state with a log without steps": lambda path: change_state(path, log_history=[{"loss": 1.0}]),
    "state without steps": lambda path: (path / "trainer_state.json").write_text("{}"),
    "state that is a list": lambda path: (path / "trainer_state.json").write_text("[]"),
    "state that is null": lambda path: (path / "trainer_state.json").write_text("null"),
    "state too deep": lambda path: (path / "trainer_state.json").write_text("[" * 100_000),
    "state in another encoding": lambda path: (path / "trainer_state.json").write_bytes(b"\xff\xfe{\x00}\x00"),
    "random state truncated": lambda path: truncate(path / "rng_state.pth"),
    "random state empty": lambda path: truncate(path / "rng_state.pth", 0),
    "random state of another library": lambda path: replace_torch(path, "rng_state.pth", {"jax": 1}),
    "random state of another python": lambda path: change_random_state(path, python=(9, (), None)),
    "random state of another torch": lambda path: change_random_state(path, cpu=torch.zeros(3, dtype=torch.uint8)),
    "a process's random state truncated": lambda path: (path / "rng_state_0.pth").write_bytes(b"PK"),
    "optimizer of other weights": lambda path: replace_torch(path, "optimizer.pt", {"state": {}, "param_groups": []}),
    "optimizer without groups": lambda path: replace_torch(path, "optimizer.pt", {"state": {}}),
    "optimizer of foreign classes": lambda path: replace_torch(path, "optimizer.pt", truncate),
    "scheduler of another kind": lambda path: replace_torch(path, "scheduler.pt", [1]),
    "scheduler missing": lambda path: (path / "scheduler.pt").unlink(),
    "scaler truncated": lambda path: (path / "scaler.pt").write_bytes(b""),
    "configuration truncated": lambda path: (path / "config.json").write_text('{"model_type":'),
    "adapter of another model": lambda path: save_adapter_of(path, a=torch.zeros(2)),
    "a folder in place of a file": lambda path: ((path / "optimizer.pt").unlink(), (path / "optimizer.pt").mkdir()),
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
def test_an_incomplete_checkpoint_is_set_aside_for_an_older_one(fault, checkpoints, uninterrupted, capsys):
    shapes = [tuple(weight.shape) for weight in uninterrupted[2].values()]
    assert checkpoint_fault(checkpoints / "checkpoint-6", shapes) is None
    FAULTS[fault](checkpoints / "checkpoint-6")
    assert last_good_checkpoint(checkpoints, shapes).name == "checkpoint-4"
    assert (checkpoints / "broken-checkpoint-6").is_dir() and not (checkpoints / "checkpoint-6").exists()
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and "checkpoint-6 is not whole" in said
    assert str(checkpoints) not in said, "no machine's folders in a notebook"
    assert last_good_checkpoint(checkpoints).name == "checkpoint-4", "and the next call does not stumble over it"


@pytest.mark.model
def test_a_checkpoint_broken_twice_is_set_aside_twice(checkpoints):
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


@pytest.mark.model
def test_a_finished_run_resumes_without_another_step(tmp_path, capsys):
    # Four of six steps: in the middle of an epoch, where the Trainer alone would take a fifth.
    config = load_config("smoke", ["training.max_steps=4", "training.save_steps=2", "training.eval_steps=null"])
    first = trained(tmp_path, config)
    again = trained(tmp_path, config)
    assert "resuming after step 4 of 4 (checkpoint-4)" in capsys.readouterr().out
    assert again.state.global_step == 4 and losses(again) == losses(first)
    weights, taken_up = adapter_weights(first), adapter_weights(again)
    assert all(taken_up[name].equal(weights[name]) for name in weights)


@pytest.mark.model
@pytest.mark.parametrize("newest", ["deleted", "truncated", "foreign"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_did(newest, uninterrupted, checkpoints, capsys):
    _, by_step, weights = uninterrupted
    if newest == "deleted":
        shutil.rmtree(checkpoints / "checkpoint-6")
    elif newest == "foreign":
        change_state(checkpoints / "checkpoint-6", rows_seen=12)
    else:
        truncate(checkpoints / "checkpoint-6" / "adapter_model.safetensors")
    trainer = trained(checkpoints)
    assert "resuming after step 4 of 6 (checkpoint-4)" in capsys.readouterr().out
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 1e-6
    whole = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
    assert whole == ["checkpoint-4", "checkpoint-6"], "a broken one must not displace a whole one"
    assert saved_state(checkpoints, 6)["global_step"] == 6


# --- plans that differ in nothing but how the batch is shared out --------------------------------------------------


SHAPES = [(4, 1, False), (2, 2, False), (1, 4, False), (4, 1, True), (2, 2, True), (1, 4, True)]


@pytest.mark.model
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(plan(*shape)).replace(" ", "-"))
def test_every_plan_takes_the_same_rows_to_the_same_losses(shape, uninterrupted, rows_of_the_uninterrupted, tmp_path):
    _, by_step, weights = uninterrupted
    seen = []
    trainer = trained(tmp_path, plans=[plan(*shape)], change=lambda trainer, plan: record_rows(trainer, seen))
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == shape[:2]
    assert trainer.model.is_gradient_checkpointing is shape[2]
    assert seen == rows_of_the_uninterrupted
    # Measured: 7e-8 for the losses, relative, and 3e-7 for the weights.
    assert losses(trainer) == pytest.approx(by_step, rel=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 2e-6


def record_rows(trainer, seen):
    collate = trainer.data_collator

    def recording(rows):
        seen.extend(tuple(row["input_ids"]) for row in rows)
        return collate(rows)

    trainer.data_collator = recording


@pytest.fixture(scope="module")
def rows_of_the_uninterrupted(tmp_path_factory):
    """The rows of two passes over ten, in the order in which the plan of the settings takes them."""
    seen = []
    folder = tmp_path_factory.mktemp("rows") / "checkpoints"
    trained(folder, change=lambda trainer, plan: record_rows(trainer, seen))
    assert len(seen) == 20 and len(set(seen)) == 10 and seen[:10] != seen[10:], "each pass in an order of its own"
    return seen


# --- steps and passes ----------------------------------------------------------------------------------------------


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
    planned = step_plan(load_config("smoke", overrides), rows)
    assert {key: planned[key] for key in expected} == expected


def test_the_article_takes_60_steps_of_8_rows_not_a_full_pass():
    assert step_plan(load_config("article"), 500) == {"rows": 500, "effective_batch": 8, "steps": 60, "epochs": 0.95}


@pytest.mark.model
def test_the_planned_epoch_is_the_trainers_own(tmp_path):
    config = load_config("smoke", [*SETTINGS, "training.max_steps=-1", "training.num_train_epochs=1"])
    trainer = trained(tmp_path, config)
    assert trainer.state.global_step == step_plan(config, len(trainer.train_dataset))["steps"] == 3
