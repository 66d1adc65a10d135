"""Kaggle's accelerators: what a run asks of them is checked before anything is built."""

from __future__ import annotations

import pytest

from medcot_utils.config import PROFILES, load_config
from medcot_utils.series.kaggle.accelerators import ACCELERATORS, DEFAULT, AcceleratorError, check_accelerator, find_accelerator


def test_every_profile_fits_the_default_accelerator():
    for profile in PROFILES:
        assert check_accelerator(DEFAULT, load_config(profile)).describe() == "2 x T4, 16 GB each, float16"


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("NvidiaTeslaT4", ["model.dtype=bfloat16"], "model.dtype is bfloat16, but NvidiaTeslaT4"),
        ("NvidiaTeslaT4", ["training.num_processes=4"], "training.num_processes is 4, but NvidiaTeslaT4 has 2 x T4"),
        ("NvidiaL4X1", ["training.num_processes=2"], "Set training.num_processes=1"),
    ],
)
def test_what_does_not_fit_an_accelerator_is_one_line(name, settings, said):
    with pytest.raises(AcceleratorError) as caught:
        check_accelerator(name, load_config("article", settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_fits_an_accelerator_is_accepted():
    check_accelerator("NvidiaTeslaT4", load_config("article", ["training.num_processes=2", "model.dtype=float16"]))
    check_accelerator("NvidiaL4", load_config("article", ["training.num_processes=4", "model.dtype=bfloat16"]))


def test_a_profile_larger_than_the_gpu_is_refused(monkeypatch):
    import medcot_utils.series.kaggle.accelerators as module

    needs = module.profile_needs("article")
    monkeypatch.setattr(module, "profile_needs", lambda profile: type(needs)(**vars(needs) | {"gpu_gib": 20}))
    with pytest.raises(AcceleratorError, match=r"needs a GPU with at least 20 GiB, and NvidiaTeslaT4 has .* \(14.4 GiB usable\)"):
        check_accelerator("NvidiaTeslaT4", load_config("article"))
    assert check_accelerator("NvidiaL4", load_config("article")).count == 4


@pytest.mark.parametrize("name", ["T4x2", "A100", "nvidiateslat4", ""])
def test_an_unknown_accelerator_lists_those_that_there_are(name):
    with pytest.raises(AcceleratorError) as caught:
        find_accelerator(name)
    assert f"no accelerator {name!r}" in str(caught.value) and "NvidiaTeslaT4 (2 x T4), NvidiaL4 (4 x L4)" in str(caught.value)
    assert all(known in str(caught.value) for known in ACCELERATORS)
