"""What the reader sees of a training: the figure, and the lines through which several processes tell the notebook."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.training.callbacks import LossFigure, skipped_steps, tabulate_log
from medcot_utils.training.launch import _show
from medcot_utils.training.progress import ProgressFile, measured_memory_gb, read_peak

LOG = [{"step": 1, "loss": 7.25}, {"step": 2, "loss": 6.5}, {"step": 2, "eval_loss": 7.0}]


class SimulatedDisplay:
    """What `display` was given, in order: it stands in for a notebook's front end, which keeps pictures and no curves."""

    def __init__(self):
        self.figures, self.updates = [], 0

    def display(self, figure, display_id):
        self.figures.append(figure)
        return self

    def update(self, figure):
        self.figures.append(figure)
        self.updates += 1

    def points(self):
        """(steps, losses) of the curve of each figure."""
        return [[tuple(axis) for axis in figure.axes[0].lines[0].get_data()] for figure in self.figures]


@pytest.fixture
def shown(monkeypatch):
    shown = SimulatedDisplay()
    monkeypatch.setattr("IPython.display.display", shown.display)
    return shown


@pytest.fixture
def tell(tmp_path):
    """`tell("on_log", step, log)` lets the first process's ProgressFile write, as the trainer would; `tell.path` is its file."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback = ProgressFile(tmp_path / "progress.jsonl", "2 processes")

    def call(event, step=0, log=(), first=True):
        state = TrainerState(global_step=step, max_steps=6, log_history=list(log), is_world_process_zero=first)
        getattr(callback, event)(arguments, state, TrainerControl())

    call.path, call.callback = callback.path, callback
    return call


@pytest.fixture
def simulated_memory(monkeypatch):
    """`simulated_memory(mb)`: a simulated GPU of which this process has held so much, half of it in use."""

    def hold(mb):
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
        monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: mb * 1_000_000)
        monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: mb * 500_000)

    return hold


def process():
    return subprocess.Popen([sys.executable, "-S", "-c", "pass"])


def running(write):
    """A simulated process that is there for two looks, and writes between them."""
    states = iter([lambda: None, lambda: write(), lambda: 0])
    return SimpleNamespace(poll=lambda: next(states)())


# --- the figure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [[], [{"step": 1, "eval_loss": 7.0}, {"step": 1, "skipped_step": 1}]])
def test_simulated_display_draws_no_figure_without_a_loss(shown, log):
    LossFigure().draw(log)
    assert shown.figures == []


def test_simulated_display_redraws_the_figure_in_place(shown):
    figure = LossFigure()
    figure.draw([])
    figure.draw(LOG[:1])
    figure.draw(LOG)
    assert (len(shown.figures), shown.updates) == (2, 1)
    assert shown.points() == [[(1,), (7.25,)], [(1, 2), (7.25, 6.5)]]


def test_simulated_display_starts_at_the_loss_before_training(shown):
    LossFigure(before=8.5).draw(LOG)
    held_out = shown.figures[0].axes[0].lines[1].get_data()
    assert [list(axis) for axis in held_out] == [[0, 2], [8.5, 7.0]]


# --- the first process's lines -------------------------------------------------------------------------------------


def test_simulated_display_shows_one_bar_and_figure_of_process_0(tell, shown, capsys):
    tell("on_train_begin")
    tell("on_step_end", 1)
    tell("on_log", 1, LOG[:1])
    tell("on_step_end", 2)
    tell("on_log", 2, LOG)
    lines = [json.loads(line) for line in tell.path.read_text().splitlines()]
    assert [(line["step"], line["max_steps"]) for line in lines] == [(0, 6), (1, 6), (1, 6), (2, 6), (2, 6)]
    _show(process(), tell.path)
    assert shown.points()[-1] == [(1, 2), (7.25, 6.5)]
    told = capsys.readouterr()
    assert "2/6" in told.err and "loss=6.500" in told.err
    assert told.out == "2 processes\n", "how they split a step, once"


def test_simulated_display_reads_lines_while_processes_run(tell, shown):
    # What came after the first look counts too.
    tell("on_log", 1, LOG[:1])
    _show(running(lambda: tell("on_log", 2, LOG)), tell.path)
    assert shown.points() == [[(1,), (7.25,)], [(1, 2), (7.25, 6.5)]]
    assert shown.updates == 1, "one figure, drawn anew"


def test_simulated_display_resumes_its_bar_where_it_stopped(tell, shown, capsys):
    tell("on_train_begin", 2, LOG)
    _show(process(), tell.path)
    assert shown.points() == [[(1, 2), (7.25, 6.5)]]
    assert "2/6" in capsys.readouterr().err


def test_only_the_first_process_writes(tell):
    tell("on_step_end", 1, first=False)
    tell("on_log", 1, LOG, first=False)
    assert not tell.path.exists()


def test_a_single_process_writes_neither_plan_nor_log(tell):
    tell.callback.plan = None
    for event in ("on_train_begin", "on_log", "on_step_end"):
        tell(event, 1, LOG[:1])
    assert [json.loads(line) for line in tell.path.read_text().splitlines()] == [{"step": 1, "max_steps": 6}] * 2


def test_memory_is_that_of_the_process_that_trained_last(tell, run_factory, write_all, simulated_memory):
    """On a simulated GPU. Notebook 05's own process has not trained if several have, or if an earlier session has."""
    run = write_all(run_factory())
    tell.callback.path = run.checkpoint_dir("adapter") / PROGRESS
    assert measured_memory_gb(run) == {}
    for event, step, mb in [("on_train_begin", 0, 900), ("on_step_end", 1, 7000), ("on_train_end", 1, 8640)]:
        simulated_memory(mb)
        tell(event, step)
    simulated_memory(120_000)  # of the process that reads it
    assert measured_memory_gb(run) == {"memory, measured: reserved (GB)": 8.6, "memory, measured: in use (GB)": 4.3}


@pytest.mark.parametrize("last", ["7", "[]", "null", '{"step": 3}', "{", pytest.param("[" * 100_000, id="nested")])
def test_a_line_that_is_no_progress_is_passed_over(last, tmp_path):
    peak = {"allocated": 4, "reserved": 5}
    (tmp_path / PROGRESS).write_text(json.dumps({"step": 1, "max_steps": 6, "peak_gpu_memory_mb": peak}) + f"\n{last}\n")
    assert read_peak(tmp_path / PROGRESS) == peak


@pytest.mark.parametrize("last", [{}, {"peak_gpu_memory_mb": 3}, {"peak_gpu_memory_mb": {"allocated": math.inf, "reserved": 1}}])
def test_an_earlier_sessions_memory_is_not_this_ones(last, tmp_path):
    lines = [{"peak_gpu_memory_mb": {"allocated": 4, "reserved": 5}}, last]
    (tmp_path / PROGRESS).write_text("".join(json.dumps({"step": 1, "max_steps": 6} | line) + "\n" for line in lines))
    assert read_peak(tmp_path / PROGRESS) is None


def test_simulated_display_leaves_a_half_written_line_for_later(tell, shown):
    tell("on_log", 1, LOG[:1])
    line = json.dumps({"step": 2, "max_steps": 6, "log_history": LOG})

    def write(text):
        with tell.path.open("a") as lines:
            lines.write(text)

    write(line[:40])
    _show(running(lambda: write(line[40:] + "\n")), tell.path)
    assert shown.points()[-1] == [(1, 2), (7.25, 6.5)]


def test_simulated_display_shows_nothing_before_the_first_line(tell, shown):
    _show(process(), tell.path)
    assert shown.figures == []


def test_skipped_steps_are_counted_by_their_entries():
    assert skipped_steps(LOG) == 0
    assert skipped_steps([*LOG, {"step": 1, "skipped_step": 1}, {"step": 3, "skipped_step": 1}]) == 2


def test_a_logged_step_has_one_line_in_equal_digits():
    logged = [
        {"step": 2, "loss": 3.3465, "grad_norm": 0.442, "learning_rate": 0.00067},
        {"step": 10, "loss": 3.36104, "grad_norm": 0.5, "learning_rate": 0.002},
        {"step": 10, "eval_loss": float("nan")},
        {"step": 12, "skipped_step": 1},
    ]
    table = tabulate_log(logged)
    assert table.columns.tolist() == ["loss", "eval_loss", "grad_norm", "learning_rate"]
    assert table.loc[2].tolist() == ["3.3465", "", "0.442", "6.70e-04"]
    assert table.loc[10].tolist() == ["3.3610", "nan", "0.500", "2.00e-03"] and len(table) == 2
    assert tabulate_log([{"step": 6, "train_loss": 1.5}]).empty
