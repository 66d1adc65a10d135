"""Training: the trainer's arguments, whole and broken checkpoints, resume, batch plans, memory that runs out, and time."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from transformers import TrainerCallback

from medcot_utils import data
from medcot_utils.callbacks import SESSION_STARTED, SkippedSteps, SkippedStepsError, TimeBudgetReached, skipped_steps
from medcot_utils.config import load_config
from medcot_utils.engines import get_engine
from medcot_utils.plans import BatchPlan
from medcot_utils.training import (
    TrainingError,
    check_effective_batch,
    checkpoint_fault,
    last_good_checkpoint,
    make_sft_trainer,
    plan_training,
    prepare_trainer,
    sft_arguments,
    step_plan,
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder with checkpoint-4 and checkpoint-6, losses by step, adapter weights) of six real steps."""
    folder = tmp_path_factory.mktemp("trainer") / "checkpoints"
    trainer = trained(folder)
    return folder, losses(trainer), adapter_weights(trainer)


@pytest.fixture
def checkpoints(uninterrupted, tmp_path):
    """A copy of the checkpoints that a test may break."""
    return shutil.copytree(uninterrupted[0], tmp_path / "checkpoints")


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["unsloth", True, False])
def test_trls_defaults_for_row_length_and_checkpointing_are_overruled(asked, tmp_path):
    from trl import SFTConfig

    engine = get_engine(CONFIG.model)
    arguments = sft_arguments(CONFIG, plan(checkpointing=asked)) | engine.trainer_arguments(CONFIG.training)
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


@pytest.mark.model
def test_with_two_cards_visible_stood_in_for_by_their_count_one_is_used_and_the_batch_stays(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2  # what the Trainer counts, and what it then makes of its batch
    trainer._train_batch_size = trainer.args.train_batch_size
    with pytest.raises(TrainingError, match=r"8 rows where 4 were asked for \(2 cards visible\)"):
        check_effective_batch(trainer, CONFIG)
    assert trainer.get_train_dataloader().batch_sampler.batch_size == 4
    prepare_trainer(trainer, CONFIG)
    assert check_effective_batch(trainer, CONFIG) == trainer.get_total_train_batch_size(trainer.args) == 4
    assert trainer.get_train_dataloader().batch_sampler.batch_size == 2 and trainer.args.n_gpu == 1


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


@pytest.mark.model
def test_a_finished_run_is_taken_up_without_another_step(tmp_path, capsys):
    # Four of six steps: in the middle of an epoch, where the Trainer alone would take a fifth.
    config = load_config("smoke", ["training.max_steps=4", "training.save_steps=2", "training.eval_steps=null"])
    first = trained(tmp_path, config)
    again = trained(tmp_path, config)
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
def test_every_plan_of_one_effective_batch_takes_the_same_rows_in_the_same_order_to_the_same_losses(
    shape, uninterrupted, rows_of_the_uninterrupted, tmp_path
):
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


# --- memory that runs out ------------------------------------------------------------------------------------------


class SimulatedOutOfMemory(TrainerCallback):
    """Raises within a step, as a card would: after its first micro-batch, when gradients are there and no weight has moved."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def raise_within_the_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            raise self.error

    on_substep_end = on_pre_optimizer_step = raise_within_the_step  # a step of a single micro-batch has no substep


# A card's own words; accelerate knows them by " out of memory.".
OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB of which 1.1 GiB is free."
)


def failing(at, error=OUT_OF_MEMORY):
    """`change` for `trained`: the plans run out of memory at these steps, in turn; the plans after them do not."""
    steps = iter(at)

    def change(trainer, plan):
        step = next(steps, None)
        if step is not None:
            trainer.add_callback(SimulatedOutOfMemory(step, error))

    return change


@pytest.mark.model
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_plan_that_runs_out_of_memory_simulated_is_followed_by_the_next_from_the_last_finished_step(
    step, uninterrupted, tmp_path, capsys
):
    _, by_step, weights = uninterrupted
    trainer = trained(tmp_path, plans=[plan(2, 2), plan(1, 4)], change=failing([step]))
    said = capsys.readouterr().out
    assert (
        f"out of memory after step {step - 1} with 2 rows x 2 micro-batches, no checkpointing: going on from there with "
        f"1 rows x 4 micro-batches, no checkpointing"
    ) in said
    # After step 2 there is a checkpoint anyway, after step 3 there is none, after step 0 there is nothing to keep.
    assert (f"resuming after step {step - 1} of 6 (checkpoint-{step - 1})" in said) is (step > 1)
    assert trainer.args.per_device_train_batch_size == 1 and trainer.state.global_step == 6
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 1e-6
    assert saved_state(tmp_path, 6)["global_step"] == 6


@pytest.mark.model
def test_memory_that_runs_out_twice_simulated_goes_down_two_plans(uninterrupted, tmp_path, capsys):
    _, by_step, weights = uninterrupted
    plans = [plan(2, 2), plan(1, 4), plan(1, 4, True)]
    trainer = trained(tmp_path, plans=plans, change=failing([2, 4]))
    said = capsys.readouterr().out
    assert "out of memory after step 1 with 2 rows" in said and "out of memory after step 3 with 1 rows" in said
    assert trainer.model.is_gradient_checkpointing
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 1e-6


@pytest.mark.model
def test_the_last_plan_that_runs_out_of_memory_simulated_raises_the_cards_own_error(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate"):
        trained(tmp_path, plans=[plan(2, 2), plan(1, 4)], change=failing([3, 3]))
    assert last_good_checkpoint(tmp_path).name == "checkpoint-2", "what was finished is kept"


@pytest.mark.model
def test_another_error_is_raised_at_once_and_no_smaller_plan_is_tried(tmp_path, capsys):
    tried = []
    fail = failing([3], RuntimeError("expected scalar type Half but found Float"))
    with pytest.raises(RuntimeError, match="expected scalar type Half"):
        trained(tmp_path, plans=[plan(2, 2), plan(1, 4)], change=lambda trainer, plan: (tried.append(plan), fail(trainer, plan)))
    assert tried == [plan(2, 2)] and "out of memory" not in capsys.readouterr().out


# --- time that runs out --------------------------------------------------------------------------------------------


def timed(max_hours, *more):
    return load_config("smoke", [*SETTINGS, f"training.max_hours={max_hours}", *more])


@pytest.mark.model
def test_a_budget_that_is_over_stops_after_one_step_with_a_whole_checkpoint_and_the_next_call_ends_the_run(
    uninterrupted, tmp_path, capsys
):
    _, by_step, weights = uninterrupted
    with pytest.raises(TimeBudgetReached, match=r"stopped after step 1 of 6, before training\.max_hours were over"):
        trained(tmp_path, timed(1e-6))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")] == ["checkpoint-1"]
    assert checkpoint_fault(tmp_path / "checkpoint-1") is None
    trainer = trained(tmp_path, CONFIG)
    assert "resuming after step 1 of 6 (checkpoint-1)" in capsys.readouterr().out
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 1e-6


@pytest.mark.model
def test_a_budget_that_is_over_at_every_call_still_ends_the_run_one_step_a_call(uninterrupted, tmp_path):
    stopped = []
    for _ in range(10):
        try:
            trainer = trained(tmp_path, timed(1e-6))
            break
        except TimeBudgetReached as pause:
            stopped.append(str(pause).partition(",")[0])
    # Nothing is left to do after the last step, so there it does not raise.
    assert stopped == [f"stopped after step {step} of 6" for step in range(1, 6)]
    assert losses(trainer) == pytest.approx(uninterrupted[1], abs=1e-6)


@pytest.mark.model
def test_a_budget_that_is_over_at_the_last_step_does_not_raise(tmp_path):
    trainer = trained(tmp_path, timed(1e-6, "training.max_steps=1"))
    assert trainer.state.global_step == 1 and checkpoint_fault(tmp_path / "checkpoint-1") is None


@pytest.mark.model
@pytest.mark.parametrize(
    ("began", "max_hours", "stops"),
    [(None, 1, False), (0, 1, False), (-3600, 1, True), (-3600, 2, False), (-1.5 * 3600, 2, False), (-2 * 3600, 2, True)],
)
def test_the_budget_counts_from_the_beginning_of_the_session(began, max_hours, stops, tmp_path, monkeypatch):
    if began is not None:
        monkeypatch.setenv(SESSION_STARTED, str(time.time() + began))
    config = timed(max_hours, "training.max_steps=2")
    if stops:
        with pytest.raises(TimeBudgetReached, match="after step 1 of 2"):
            trained(tmp_path, config)
    else:
        assert trained(tmp_path, config).state.global_step == 2


class SlowSteps(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        time.sleep(2)


@pytest.mark.model
def test_the_budget_leaves_time_for_two_more_steps_and_a_minute_to_save(tmp_path):
    # A step of two seconds ends at second 2: 2 + 2 x 2 + 60 are more than 64, 2 + 60 alone are not.
    with pytest.raises(TimeBudgetReached, match="after step 1 of 6"):
        trained(tmp_path, timed(64 / 3600), change=lambda trainer, plan: trainer.add_callback(SlowSteps()))


# --- steps that do not count ---------------------------------------------------------------------------------------


class ScriptedAccelerator:
    """Stands in for accelerate's, of which only one with a float16 card skips steps: it says whether each step was skipped."""

    def __init__(self, script):
        self.script = iter(script)

    @property
    def optimizer_step_was_skipped(self):
        return next(self.script)


def skipping(script):
    return lambda trainer, plan: trainer.add_callback(SkippedSteps(ScriptedAccelerator(script)))


@pytest.mark.model
def test_five_skipped_steps_by_a_scripted_accelerator_are_counted_and_kept_in_log_and_checkpoint(uninterrupted, tmp_path):
    trainer = trained(tmp_path, change=skipping([True, True, False, True, True, True]))
    assert skipped_steps(trainer.state.log_history) == 5
    assert [entry["step"] for entry in trainer.state.log_history if "skipped_step" in entry] == [1, 2, 4, 5, 6]
    assert skipped_steps(saved_state(tmp_path, 4)["log_history"]) == 3
    assert skipped_steps(saved_state(tmp_path, 6)["log_history"]) == 5
    assert losses(trainer) == uninterrupted[1], "the losses are beside them"


@pytest.mark.model
def test_the_sixth_skipped_step_by_a_scripted_accelerator_ends_the_run_with_the_number(tmp_path):
    with pytest.raises(SkippedStepsError, match=r"6 of 7 optimizer steps were skipped.*up to 5.*lower training\.learning_rate"):
        trained(
            tmp_path,
            load_config("smoke", [*SETTINGS, "training.max_steps=9"]),
            change=skipping([True] * 3 + [False] + [True] * 5),
        )


@pytest.mark.model
@pytest.mark.parametrize(("script", "raises"), [([True, False], False), ([True, True], True)])
def test_steps_skipped_by_a_scripted_accelerator_before_a_resume_count_after_it(script, raises, tmp_path):
    trained(tmp_path, change=skipping([True] * 4 + [False] * 2))
    shutil.rmtree(tmp_path / "checkpoint-6")
    if raises:
        with pytest.raises(SkippedStepsError, match="6 of 6 optimizer steps"):
            trained(tmp_path, change=skipping(script))
    else:
        assert skipped_steps(trained(tmp_path, change=skipping(script)).state.log_history) == 5


@pytest.mark.model
def test_a_trainer_made_ready_counts_skipped_steps_and_watches_the_time_only_if_asked(tmp_path):
    from medcot_utils.callbacks import TimeBudget

    def kinds(config):
        return {type(callback) for callback in prepare_trainer(make_trainer(tmp_path, config), config).callback_handler.callbacks}

    assert SkippedSteps in kinds(CONFIG) and TimeBudget not in kinds(CONFIG)
    assert {SkippedSteps, TimeBudget} <= kinds(timed(1))


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


def test_the_articles_plan_is_60_steps_of_8_rows_which_is_not_one_pass_over_500():
    assert step_plan(load_config("article"), 500) == {"rows": 500, "effective_batch": 8, "steps": 60, "epochs": 0.95}


@pytest.mark.model
def test_the_planned_epoch_is_the_trainers_own(tmp_path):
    config = load_config("smoke", [*SETTINGS, "training.max_steps=-1", "training.num_train_epochs=1"])
    trainer = trained(tmp_path, config)
    assert trainer.state.global_step == step_plan(config, len(trainer.train_dataset))["steps"] == 3
