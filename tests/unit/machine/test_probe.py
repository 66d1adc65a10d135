"""The probe of a machine: rates that a slower piece of work would lower, measured once and within seconds."""

from __future__ import annotations

import itertools
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


def test_a_pass_on_a_busy_machine_takes_its_threads_own_time(monkeypatch):
    clock, used = itertools.count(step=9), itertools.count(step=4)  # 9 s by the clock, 4 s of the processor
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "process_time", lambda: next(used))
    rates = [probe._count_per_second(lambda: None, 36, threads) for threads in (None, 1, 2)]
    assert rates == [4, 9, 18]


def test_no_more_threads_count_than_a_container_may_use(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    assert probe._usable_threads() == 2


BUSY = ", which other programs slow now: alone, it takes less"


@pytest.mark.parametrize(("load", "percent", "told"), [(0.9, 4.0, ""), (3.2, 4.0, BUSY), (0.9, 60.0, BUSY)])
def test_a_busy_machine_is_told(cpu, monkeypatch, load, percent, told):
    monkeypatch.setattr("psutil.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: percent)
    shared = []
    monkeypatch.setattr(probe, "_count_per_second", lambda work, amount, threads: shared.append(threads) or amount)
    assert probe.measure_speed().how == f"by a probe of this machine{told}"
    assert shared == ([1, probe._usable_threads(), probe._usable_threads()] if told else [None] * 3)


def test_kaggles_gpus_are_no_measurement():
    assert not probe.KAGGLE_T4S.measured and probe.KAGGLE_T4S.gpus == 2
