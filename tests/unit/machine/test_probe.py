"""The probe of a machine: rates that a slower piece of work would lower, measured once and within seconds."""

from __future__ import annotations

import time

import pytest
import torch

from medcot_utils.machine import probe


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(probe, "visible_gpus", list)
    probe.measure_speed.cache_clear()
    yield
    probe.measure_speed.cache_clear()


def test_a_cpu_is_measured_once_within_seconds(cpu):
    began = time.perf_counter()
    speed = probe.measure_speed()
    assert time.perf_counter() - began < 30, "seconds, also on a busy machine"
    assert (speed.gpus, speed.where, speed.measured) == (0, f"{torch.get_num_threads()} CPU cores", True)
    assert 1e8 < speed.product < 1e14 and 1e8 < speed.memory < 1e13 and 1e3 < speed.small_steps < 1e8
    assert probe.measure_speed() is speed


def test_the_rate_is_the_amount_over_the_shortest_time(monkeypatch):
    seconds = [4, 9, 2, 2, 8, 5, 2, 3]
    clock = iter([time for number, took in enumerate(seconds) for time in (20 * number, 20 * number + took)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert probe._count_per_second(lambda: None, 100) == 50


@pytest.mark.parametrize(("load", "told"), [(0.9, ""), (3.2, ", which other programs slowed down")])
def test_a_busy_machine_is_told(cpu, monkeypatch, load, told):
    monkeypatch.setattr("psutil.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(probe, "_count_per_second", lambda work, amount: amount)
    assert probe.measure_speed().how == f"by a probe of this machine{told}"


def test_kaggles_gpus_are_no_measurement():
    assert not probe.KAGGLE_T4S.measured and probe.KAGGLE_T4S.gpus == 2
