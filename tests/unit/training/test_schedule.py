"""Optimizers and schedules that do not exist, or cannot be made, are refused before anything is trained."""

from __future__ import annotations

import pytest

from medcot_utils.config import PROFILES, load_config
from medcot_utils.errors import MedcotError
from medcot_utils.series.runner import plan_config
from medcot_utils.training import schedule

REFUSED = {
    "optim=adamw_tourch": "training.optim: unknown 'adamw_tourch'; did you mean adamw_torch?",
    "optim=galore_adamw": "training.optim galore_adamw cannot be made here (You need to install `galore_torch`",
    "lr_scheduler_type=cosin": "training.lr_scheduler_type: unknown 'cosin'; did you mean cosine?",
    "lr_scheduler_type=zzz": "training.lr_scheduler_type: unknown 'zzz'; known: linear, cosine, ",
    "lr_scheduler_type=warmup_stable_decay": "warmup_stable_decay needs arguments that the series has no settings for",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_trained_with_is_refused_first(setting, tmp_path):
    with pytest.raises(MedcotError) as caught:
        plan_config(tmp_path / "run", "smoke", [f"training.{setting}"])
    assert REFUSED[setting] in str(caught.value) and "\n" not in str(caught.value)


def test_a_schedule_without_the_losses_it_waits_for_is_refused():
    settings = ["training.lr_scheduler_type=reduce_lr_on_plateau", "training.eval_steps=null"]
    with pytest.raises(MedcotError, match="reduce_lr_on_plateau requires an eval strategy"):
        schedule.check_schedule(load_config("smoke", settings).training)


@pytest.mark.parametrize("setting", ["optim=sgd", "optim=paged_adamw_8bit", "lr_scheduler_type=cosine"])
def test_what_can_be_made_is_said_in_one_line(setting):
    name = setting.partition("=")[2]
    assert name in schedule.check_schedule(load_config("smoke", [f"training.{setting}"]).training)


def test_what_the_profiles_set_needs_no_look():
    for profile in PROFILES:
        training = load_config(profile).training
        assert training.optim in schedule.PROVEN_OPTIMIZERS and training.lr_scheduler_type in schedule.PROVEN_SCHEDULES
