"""Which GPUs work together, and which a notebook says that it used."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.machine import gpu
from medcot_utils.machine.hardware import count_gpus_alike, name_other_gpus
from medcot_utils.training.batch_plan import count_processes


@pytest.fixture
def gpus(monkeypatch):
    """`gpus("Tesla T4", ...)`: simulated GPUs of these names."""

    def simulate(*names, visible=None):
        monkeypatch.setattr("torch.cuda.is_available", lambda: bool(names))
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: bool(names))
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(names))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda index: names[index])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")

    return simulate


@pytest.mark.parametrize(
    ("names", "visible", "others"),
    [
        ((), None, []),
        (("Tesla T4",), None, []),
        (("Tesla T4", "Tesla T4"), None, ["1"]),
        (("Tesla T4", "Tesla T4"), "3,GPU-8a1f", ["GPU-8a1f"]),
        (("L4", "L4", "GT 710", "L4"), None, ["1"]),  # those behind another kind have other numbers
        (("RTX 4090", "GT 710"), None, []),
    ],
)
def test_only_simulated_gpus_of_the_first_ones_kind_share_work(gpus, names, visible, others):
    gpus(*names, visible=visible)
    assert name_other_gpus() == others
    assert count_gpus_alike() == (len(others) + 1 if names else 0)


@pytest.mark.parametrize(
    ("count", "setting", "processes"),
    [(0, "auto", 1), (1, "auto", 1), (2, "auto", 2), (3, "auto", 2), (4, "auto", 4), (7, "auto", 4), (8, "auto", 8), (2, "1", 1)],
)
def test_auto_trains_on_all_simulated_gpus_that_divide_the_batch(gpus, count, setting, processes):
    gpus(*["Tesla T4"] * count)
    config = load_config("article", [f"training.num_processes={setting}"])
    assert config.training.effective_batch_size == 8 and count_processes(config) == processes


@pytest.mark.parametrize("profile", ["article", "recommended", "full"])
def test_profiles_of_the_8b_model_take_every_gpu(profile):
    assert load_config(profile).training.num_processes == "auto"


def test_used_gpus_are_named_with_those_lent_to_others(gpus, monkeypatch):
    monkeypatch.setattr(gpu, "_lent", set())
    monkeypatch.setattr("torch.cuda.memory_stats", lambda index: {"allocation.all.allocated": int(index == 0)})
    gpus("Tesla T4", "Tesla T4", "Tesla T4")
    assert gpu.describe_used_gpus() == "GPUs used: 0 (Tesla T4)"
    gpu.note_use(1)
    assert gpu.describe_used_gpus() == "GPUs used: 0 (Tesla T4), 1 (Tesla T4)"
    gpus()
    assert gpu.describe_used_gpus() == ""
