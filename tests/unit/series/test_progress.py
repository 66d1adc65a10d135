"""What is said of a running notebook: its section, what its cell has shown last, and when it should end."""

from __future__ import annotations

import threading
import time

import nbformat
import pytest

from medcot_utils.series import progress
from medcot_utils.series.progress import find_heading, read_last_line, watching

LASTING = {"seconds": 600.0, "low": 400.0, "high": 900.0}


@pytest.fixture
def cells():
    v4 = nbformat.v4
    made = [
        v4.new_markdown_cell("# 2. Baseline"),
        v4.new_code_cell("start()"),
        v4.new_markdown_cell("## 2.7 The answers\n\nWhy."),
        v4.new_markdown_cell("More of it.\n## not a heading of a section"),
        v4.new_code_cell("answer()"),
    ]
    streams = ("stdout", "stderr", "stderr")
    bars = ["24 answers in batches of 8\n", "\ranswers:  0%| 0/24", "\ranswers: 33%|###     | 8/24 [01:00<02:00]\n\n"]
    made[4].outputs = [v4.new_output("stream", name=name, text=text) for name, text in zip(streams, bars, strict=True)]
    return made


def test_a_cell_belongs_to_the_last_section_before_it(cells):
    assert [find_heading(cells, index) for index in range(5)] == ["", "", *["2.7 The answers"] * 3]


def test_the_last_state_of_a_bar_is_what_a_cell_shows(cells):
    assert read_last_line(cells, 4) == "answers: 33% 8/24 [01:00<02:00]"
    assert read_last_line(cells, 1) == "" and read_last_line([], 0) == ""


def test_a_running_notebook_is_told_of_until_it_ends(cells, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.01)
    monkeypatch.setenv("HF_TOKEN", secret := "hf_" + "a1B2" * 9)
    cells[4].outputs[-1].text += f"token {secret}\n"
    said, told = [], threading.Event()
    with watching("02_baseline_inference", LASTING, lambda line: (said.append(line), told.set())) as watch:
        watch.begin_cell(cells, 4)
        told.clear()
        assert told.wait(10)
    assert said[-1].startswith("02_baseline_inference: 2.7 The answers, token **") and secret not in "".join(said)
    assert ", until about " in said[-1]
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count, "silent once the notebook has ended"


def test_a_terminal_shows_it_all_the_time_and_gets_no_lines(cells, monkeypatch):
    monkeypatch.setattr(progress, "_LIVE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.01)
    said, shown, told = [], [], threading.Event()
    with watching("05_training", None, said.append, lambda line: (shown.append(line), told.set())) as watch:
        watch.begin_cell(cells, 4)
        told.clear()
        assert told.wait(10)
    assert shown[-1] == "05_training: 2.7 The answers, answers: 33% 8/24 [01:00<02:00]" and not said


def test_a_notebook_without_an_estimate_still_tells_its_section(cells):
    watch = progress.Watch("02_baseline_inference", None)
    assert watch.describe() == "02_baseline_inference: running"
    watch.begin_cell(cells, 2)
    assert watch.describe() == "02_baseline_inference: 2.7 The answers"
