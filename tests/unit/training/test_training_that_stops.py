"""Training that memory, time or skipped steps end or interrupt: what is kept, said, and gone on with."""

from __future__ import annotations

import math
import shutil
import time

import pytest
import torch
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
    trainer_maker,
)
from transformers import TrainerCallback

from medcot_utils.config import load_config
from medcot_utils.run.clock import SESSION_STARTED, TimeBudgetReached
from medcot_utils.training.callbacks import (
    DivergedError,
    SkippedSteps,
    SkippedStepsError,
    TrackLog,
    skipped_steps,
)
from medcot_utils.training.trainer import (
    checkpoint_fault,
    last_good_checkpoint,
    prepare_trainer,
    train,
)

pytest_plugins = ("training_fixtures",)


# --- memory that runs out ------------------------------------------------------------------------------------------


class SimulatedOutOfMemory(TrainerCallback):
    """Raises within a step, as a GPU would: after its first micro-batch, when gradients are there and no weight has moved."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def raise_within_the_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            raise self.error

    on_substep_end = on_pre_optimizer_step = raise_within_the_step  # a step of a single micro-batch has no substep


# A GPU's own words; accelerate knows them by " out of memory.".
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
def test_simulated_out_of_memory_resumes_with_the_next_plan(step, uninterrupted, tmp_path, capsys):
    _, by_step, weights = uninterrupted
    trainer = trained(tmp_path, plans=[plan(2, 2), plan(1, 4)], change=failing([step]))
    said = capsys.readouterr().out
    assert (
        f"out of memory after step {step - 1} with 2 rows x 2 micro-batches, no checkpointing: continuing from there with "
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
def test_simulated_out_of_memory_twice_moves_down_two_plans(uninterrupted, tmp_path, capsys):
    _, by_step, weights = uninterrupted
    plans = [plan(2, 2), plan(1, 4), plan(1, 4, True)]
    trainer = trained(tmp_path, plans=plans, change=failing([2, 4]))
    said = capsys.readouterr().out
    assert "out of memory after step 1 with 2 rows" in said and "out of memory after step 3 with 1 rows" in said
    assert trainer.model.is_gradient_checkpointing
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 1e-6


@pytest.mark.model
def test_simulated_out_of_memory_in_the_last_plan_is_raised(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate"):
        trained(tmp_path, plans=[plan(2, 2), plan(1, 4)], change=failing([3, 3]))
    assert last_good_checkpoint(tmp_path).name == "checkpoint-2", "what was finished is kept"


@pytest.mark.model
def test_another_error_is_raised_without_trying_a_smaller_plan(tmp_path, capsys):
    tried = []
    fail = failing([3], RuntimeError("expected scalar type Half but found Float"))
    with pytest.raises(RuntimeError, match="expected scalar type Half"):
        trained(tmp_path, plans=[plan(2, 2), plan(1, 4)], change=lambda trainer, plan: (tried.append(plan), fail(trainer, plan)))
    assert tried == [plan(2, 2)] and "out of memory" not in capsys.readouterr().out


# --- time that runs out --------------------------------------------------------------------------------------------


def timed(max_hours, *more):
    return load_config("smoke", [*SETTINGS, f"training.max_hours={max_hours}", *more])


@pytest.mark.model
def test_a_spent_budget_stops_after_one_step_and_the_run_resumes(uninterrupted, tmp_path, capsys):
    _, by_step, weights = uninterrupted
    with pytest.raises(TimeBudgetReached, match=r"stopped after step 1 of 6, before training\.max_hours ended"):
        trained(tmp_path, timed(1e-6))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")] == ["checkpoint-1"]
    assert checkpoint_fault(tmp_path / "checkpoint-1") is None
    trainer = trained(tmp_path, CONFIG)
    assert "resuming after step 1 of 6 (checkpoint-1)" in capsys.readouterr().out
    assert losses(trainer) == pytest.approx(by_step, abs=1e-6)
    assert largest_difference(adapter_weights(trainer), weights) <= 1e-6


@pytest.mark.model
def test_a_spent_budget_still_makes_one_step_per_call(uninterrupted, tmp_path):
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
def test_the_budget_reserves_two_steps_and_a_minute_to_save(tmp_path):
    # A step of two seconds ends at second 2: 2 + 2 x 2 + 60 are more than 64, 2 + 60 alone are not.
    with pytest.raises(TimeBudgetReached, match="after step 1 of 6"):
        trained(tmp_path, timed(64 / 3600), change=lambda trainer, plan: trainer.add_callback(SlowSteps()))


# --- steps that do not count ---------------------------------------------------------------------------------------


class ScriptedAccelerator:
    """Stands in for accelerate's, of which only one with a float16 GPU skips steps: it says whether each step was skipped."""

    def __init__(self, script):
        self.script = iter(script)

    @property
    def optimizer_step_was_skipped(self):
        return next(self.script)


def skipping(script):
    return lambda trainer, plan: trainer.add_callback(SkippedSteps(ScriptedAccelerator(script)))


@pytest.mark.model
def test_scripted_five_skipped_steps_are_counted_and_stored(uninterrupted, tmp_path):
    trainer = trained(tmp_path, change=skipping([True, True, False, True, True, True]))
    assert skipped_steps(trainer.state.log_history) == 5
    assert [entry["step"] for entry in trainer.state.log_history if "skipped_step" in entry] == [1, 2, 4, 5, 6]
    assert skipped_steps(saved_state(tmp_path, 4)["log_history"]) == 3
    assert skipped_steps(saved_state(tmp_path, 6)["log_history"]) == 5
    assert losses(trainer) == uninterrupted[1], "the losses are beside them"


@pytest.mark.model
def test_scripted_sixth_skipped_step_ends_the_run(tmp_path):
    with pytest.raises(SkippedStepsError, match=r"6 of 7 optimizer steps were skipped.*up to 5.*lower training\.learning_rate"):
        trained(
            tmp_path,
            load_config("smoke", [*SETTINGS, "training.max_steps=9"]),
            change=skipping([True] * 3 + [False] + [True] * 5),
        )


class SentLog:
    """Stands in for a tracking session, and keeps what it is sent."""

    def __init__(self):
        self.sent, self.open = [], True

    def send_log(self, log_history):
        self.sent = list(log_history)

    def close(self):
        self.open = False


@pytest.mark.model
def test_scripted_skipped_steps_reach_the_tracker_before_the_error(tmp_path):
    session = SentLog()
    make, plans = trainer_maker(tmp_path, load_config("smoke", [*SETTINGS, "training.max_steps=9"]), skipping([True] * 9))
    with pytest.raises(SkippedStepsError, match="6 of 6 optimizer steps"):
        train(make, plans, CONFIG, [TrackLog(lambda: session)])
    assert [entry["step"] for entry in session.sent if "skipped_step" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in session.sent if "loss" in entry][-1] == 6, "with its loss"
    assert not session.open


DIVERGING = [*SETTINGS, "training.learning_rate=1e8", "training.warmup_steps=0"]


@pytest.mark.model
def test_a_loss_that_is_not_finite_counts_even_if_no_step_logs(tmp_path):
    with pytest.raises(DivergedError, match="loss is nan at step 6"):
        trained(tmp_path, load_config("smoke", [*DIVERGING, "training.logging_steps=100"]))


@pytest.mark.model
def test_a_loss_that_is_not_finite_ends_the_run_unsaved(tmp_path):
    session, diverging = SentLog(), load_config("smoke", DIVERGING)
    make, plans = trainer_maker(tmp_path, diverging)
    with pytest.raises(DivergedError, match=r"loss is nan at step \d.*lower training\.learning_rate \(it is 1e\+08\)"):
        train(make, plans, diverging, [TrackLog(lambda: session)])
    sent = [entry["loss"] for entry in session.sent if "loss" in entry]
    assert not session.open and math.isnan(sent[-1]) and all(map(math.isfinite, sent[:-1])), "the log says so"
    saved = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in tmp_path.glob("checkpoint-*"))
    assert all(step < len(sent) for step in saved), "no checkpoint after the first such loss"


@pytest.mark.model
@pytest.mark.parametrize(("script", "raises"), [([True, False], False), ([True, True], True)])
def test_scripted_skipped_steps_before_a_resume_count_after_it(script, raises, tmp_path):
    trained(tmp_path, change=skipping([True] * 4 + [False] * 2))
    shutil.rmtree(tmp_path / "checkpoint-6")
    if raises:
        with pytest.raises(SkippedStepsError, match="6 of 6 optimizer steps"):
            trained(tmp_path, change=skipping(script))
    else:
        assert skipped_steps(trained(tmp_path, change=skipping(script)).state.log_history) == 5


@pytest.mark.model
def test_a_prepared_trainer_watches_time_only_if_requested(tmp_path):
    from medcot_utils.training.callbacks import TimeBudget

    def kinds(config):
        return {type(callback) for callback in prepare_trainer(make_trainer(tmp_path, config), config).callback_handler.callbacks}

    assert SkippedSteps in kinds(CONFIG) and TimeBudget not in kinds(CONFIG)
    assert {SkippedSteps, TimeBudget} <= kinds(timed(1))
