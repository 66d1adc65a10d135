"""Estimate how long each notebook will take, from the work of the configuration (`workload`) and the speed of the machine
(`machine.probe`).

The model is simple: it counts matrix products, weights that are read once per token of a batch, small operations, and bytes
that are moved. The constants below cover the rest. Each names the run that it comes from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.config import RunConfig
from medcot_utils.machine import disk
from medcot_utils.machine.durations import TimeEstimate, add_times, describe_end, describe_time
from medcot_utils.machine.paths import GIB, platform_name
from medcot_utils.machine.probe import MachineSpeed
from medcot_utils.models.batches import CPU_BATCH, ENOUGH, MAX_BATCH, PACKED_CAPABILITY, PACKED_ROWS
from medcot_utils.models.embedded import is_made, was_made_here
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.series.workload import Asked, Workload, measure_workload
from medcot_utils.training.batch_plan import count_processes

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.run.directory import Run

# The true time lies between estimate / band and estimate x band.
_MEASURED_BAND, _PUBLISHED_BAND = 1.35, 1.6
# Share of the machine's speed at matrix products that a training step reaches, at four operations per weight and token. The first
# two are without and with gradient checkpointing on an H100 (8B model, 710 TFLOP/s: 12,210 tokens/s with padded rows, and 7,146
# with checkpointing; joined rows were 1.23 times as fast as padded ones in one run). The third is for two CPU cores, where rows
# share their template (demo). The first step compiles.
_TRAINED, _TRAINED_CHECKPOINTED, _TRAINED_ON_CPU = 0.53 * 1.23, 0.32, 0.55
# Seconds of compilation: in the blocks that train joined rows (22 s for the first step at 8B on an H200, 12 s for the second),
# and with checkpointing in float16.
_COMPILE_JOINED, _COMPILE_TRAINING, _JOINED_FROM = 34, 10, (8, 0)
# The same share for text that is only read, at two operations per weight and token. On a CPU, a common beginning is read once.
_READ, _READ_ON_CPU = 0.4, 0.74
# Bytes moved on a CPU for each byte of keys and values that a token attends to (demo: 25 rows of 350 tokens, 0.3 s per step).
_ATTENDED_ON_CPU = 14
_READ_ONCE_ON_CPU = 0.45  # share of the tokens of prompts and options that a CPU reads, because common beginnings are read once
_16_BIT_ANSWERS_GIB = 36  # the 8B model in 16 bits (16 GB), the cache of 64 answers of 1,200 tokens (12 GB), and room to work
_NO_CHECKPOINTING_BYTES = 5  # GPU memory per parameter with which the article's 8 rows need no checkpointing: 40 GB at 8B
_SEVERAL_GPUS = 0.9  # speed of each additional GPU, relative to one: two train 1.91 times as fast (docs/benchmarks.md)
# Small operations of a decoder layer for one token: 21 ms per token at 8B on an H200.
_LAYER_OPERATIONS = 200
# Bytes moved per parameter if 4-bit weights are unpacked at every step: 115 ms per step at 8B on a T4, where Unsloth unpacks them
# for more than 16 rows. From an H100 on, bitsandbytes unpacks most layers for more than 16 rows (18 ms per step).
_UNPACKED, _UNPACKED_FROM = 5.0, (9, 0)
# A compiled step over a cache of fixed size takes 1.4 times as long as reading the weights (4.9 ms at 8B on an H200). Compiling
# takes 5 to 9 s, and less in a later notebook, because torch keeps compiled code on disk.
_COMPILED, _COMPILE_SECONDS = 1.4, 4
# The number of small operations that take as long as, in this order: starting a kernel with the libraries, and importing those
# that load a model; the same with a GPU (15 s and 1 s on an H200's machine); importing Unsloth.
_START, _LOADER, _START_WITH_GPU, _LOADER_WITH_GPU, _UNSLOTH = 2.8e6, 2.8e6, 4.8e6, 0.3e6, 5.6e6
# The same for loading a parameter; a resample; unpacking the embedded SmolLM2 (17 s on two CPU cores).
_PER_PARAMETER, _PER_RESAMPLE, _UNPACK_EMBEDDED = 4e-4, 200, 5e6
_CHECKS = 1.5  # notebook 01 on two CPU cores: its checks and the probe take half as long again as the libraries
_DOWNLOAD = 100e6  # bytes per second from the Hub
_MERGE = 12.0  # bytes read, written, and compared per parameter of the merged model
_DISK = 1e9  # bytes per second
_CACHED = 8e9  # bytes per second of files that the system still holds in RAM, as it does after a download

_FEWER_ANSWERS = "evaluation.num_questions, evaluation.n_samples or evaluation.mcq_limit"
SESSION_HOURS, WEEKLY_HOURS = 12, 30  # Kaggle's limits for a session and for a week's GPU time


@dataclass(frozen=True)
class SeriesEstimate:
    """Hold the seconds that each notebook will take in a new run."""

    steps: dict[str, TimeEstimate]
    speed: MachineSpeed

    @property
    def total(self) -> TimeEstimate:
        """Return the sum over all notebooks."""
        return add_times(self.steps.values())


def estimate_series(config: RunConfig, run_dir: Path | None, speed: MachineSpeed, online: bool = False) -> SeriesEstimate | None:
    """Return how long the notebooks will take on a machine of this speed; None if the model's size is unknown.

    Args:
        run_dir: the run directory, which need not exist yet; None for a run on another machine.
        online: whether rows may be downloaded from the Hub.

    Raises:
        DataError: if the data cannot be read."""
    work = measure_workload(config, online)
    if work is None:
        return None
    seconds = _Seconds(config, work, speed)
    downloads = {need.what: (need.gib or 0) * GIB / _DOWNLOAD for need in disk.needs(config, run_dir or Path("another machine"))}
    copies = [what for what in ("base model, 4 bits", "base model, 16 bits") if what in downloads]
    first, second = (*copies, "", "")[:2]
    found = {
        "01_setup": _CHECKS * seconds.start() + downloads.get("data set", 0) + seconds.unpack_embedded(),
        "02_baseline_inference": seconds.load() + downloads.get(first, 0) + seconds.stream() + seconds.ask(work.asked),
        "03_dataset_prep": seconds.start() + seconds.tokenize(),
        "04_lora_config": seconds.load(training=True),
        "05_training": seconds.load(training=True) + seconds.train() + 2 * seconds.read(work.held_out_rows * work.row_tokens),
        "06_comparison": seconds.load() + seconds.ask(work.asked_tuned) + seconds.compare() + downloads.get(second, 0),
        "07_export": seconds.load() + seconds.export(),
    }
    band = _MEASURED_BAND if speed.measured else _PUBLISHED_BAND
    return SeriesEstimate({step: _with_band(one, band) for step, one in found.items()}, speed)


def _with_band(seconds: float, band: float) -> TimeEstimate:
    return TimeEstimate(seconds=round(seconds, 1), low=round(seconds / band, 1), high=round(seconds * band, 1))


class _Seconds:
    """Compute the parts of a notebook's time, in seconds."""

    def __init__(self, config: RunConfig, work: Workload, speed: MachineSpeed) -> None:
        self.config, self.work, self.speed, self.model = config, work, speed, work.model
        self.gpus = max(1, speed.gpus)
        self.gpu_gib = min(speed.gpu_gib, config.model.gpu_memory_gib or math.inf)
        self.engine_is_unsloth = bool(speed.gpus) and config.model.engine != "transformers"

    # --- start, load ---------------------------------------------------------------------------------------------

    def start(self) -> float:
        return (_START_WITH_GPU if self.speed.gpus else _START) / self.speed.small_steps

    def load(self, training: bool = False) -> float:
        """Return the time to load the libraries and a model."""
        unsloth = self.engine_is_unsloth and (training or not self.compiles())
        loader = _UNSLOTH if unsloth else _LOADER_WITH_GPU if self.speed.gpus else _LOADER
        return self.start() + loader / self.speed.small_steps + self.load_again()

    def load_again(self) -> float:
        """Return the time to load another model in the same notebook."""
        copied = 2 * self.model.parameters / _CACHED * bool(self.speed.gpus)
        return _PER_PARAMETER * self.model.parameters / self.speed.small_steps + copied

    def unpack_embedded(self) -> float:
        """Return the time to make the embedded model, which a machine does once: in notebook 01, before it estimates."""
        name = self.config.model.name
        return _UNPACK_EMBEDDED / self.speed.small_steps if was_made_here(name) or not is_made(name) else 0.0

    def tokenize(self) -> float:
        return (self.work.train_rows + self.work.held_out_rows) * self.work.row_tokens / (0.5 * self.speed.small_steps)

    # --- text that is read or trained on -------------------------------------------------------------------------

    def read(self, tokens: float) -> float:
        """Return the time to compute the loss of `tokens` tokens."""
        return tokens * 2 * self.model.parameters / (self.speed.product * (_READ if self.speed.gpus else _READ_ON_CPU))

    def read_alike(self, tokens: float) -> float:
        """Return the time to read prompts or options that share their beginning."""
        return self.read(tokens * (1 if self.speed.gpus else _READ_ONCE_ON_CPU))

    def train(self) -> float:
        """Return the time of all optimizer steps and the evaluations between them."""
        room = self.gpu_gib * GIB > _NO_CHECKPOINTING_BYTES * self.model.parameters
        share = (_TRAINED if room else _TRAINED_CHECKPOINTED) if self.speed.gpus else _TRAINED_ON_CPU
        processes = count_processes(self.config, self.speed.gpus) if self.speed.gpus else 1
        faster = 1 + (processes - 1) * _SEVERAL_GPUS
        operations = 4 * self.model.parameters * self.work.steps * self.work.step_rows * self.work.row_tokens
        joined = (self.speed.capability or (0, 0)) >= _JOINED_FROM and self.config.model.dtype != "float16"
        compiled = (_COMPILE_JOINED if joined else _COMPILE_TRAINING) if self.speed.gpus else 0
        evaluated = self.read(self.work.evaluated_rows * self.work.row_tokens)
        return compiled + operations / (self.speed.product * share * faster) + evaluated

    # --- text that is written ------------------------------------------------------------------------------------

    def compiles(self) -> bool:
        """Return whether answers are made by compiled steps, as `models.engine` and `models.batches` decide."""
        return self.speed.gpus > 0 and self.config.model.engine != "unsloth"

    def unpacks_once(self) -> bool:
        """Return whether there is room for 16-bit weights, so that no step unpacks weights."""
        return self.compiles() and self.gpu_gib >= _16_BIT_ANSWERS_GIB

    def step(self, rows: int, context: float, in_16bit: bool = False, eager: bool = False) -> float:
        """Return the time to write one token for each of `rows` rows, with `context` tokens each.

        Args: eager: whether this step is not compiled, even if steps of many answers are."""
        model, speed = self.model, self.speed
        attended = rows * context * model.cache_bytes / speed.memory
        multiplied = rows * 2 * model.parameters / speed.product
        started = _LAYER_OPERATIONS * model.layers / speed.small_steps
        if not speed.gpus:
            weights = 4 * model.parameters / speed.memory
            return started + weights + multiplied / _READ_ON_CPU + _ATTENDED_ON_CPU * attended
        weights = 2 * model.parameters if in_16bit or self.unpacks_once() else model.base_bytes
        if self._unpacks_at_each_step(rows, in_16bit):
            weights += _UNPACKED * model.parameters
        if self.compiles() and not eager:
            return _COMPILED * weights / speed.memory + multiplied / _READ + attended
        spilled = self.spilled_bytes() / speed.upload if in_16bit else 0.0
        return started + weights / speed.memory + multiplied / _READ + attended + spilled

    def _unpacks_at_each_step(self, rows: int, in_16bit: bool) -> bool:
        if not self.model.in_4bit or in_16bit or self.unpacks_once() or rows <= PACKED_ROWS or not self.speed.capability:
            return False
        capability = self.speed.capability
        return capability >= _UNPACKED_FROM if self.compiles() else capability == PACKED_CAPABILITY

    def spilled_bytes(self) -> float:
        """Return the bytes of 16-bit weights that all GPUs together cannot hold. They are copied for every token."""
        return max(0.0, 2 * self.model.parameters - self.gpus * (self.gpu_gib - 2) * GIB) if self.speed.gpus else 0.0

    def stream(self) -> float:
        """Return the time of the one answer that is streamed."""
        tokens = self.config.generation.max_new_tokens
        return tokens * self.step(1, self.work.prompt_tokens + tokens / 2, eager=True)

    def answer(self, asked: Asked, in_16bit: bool = False) -> float:
        """Return the time of answers that are generated in batches on all GPUs."""
        share = math.ceil(asked.answers / self.gpus)
        if not share:
            return 0.0
        rows, context = self.rows_at_once(asked, share), self.work.prompt_tokens + asked.new_tokens / 2
        eager = in_16bit and self.spilled_bytes() > 0
        written = math.ceil(share / rows) * asked.new_tokens * self.step(rows, context, in_16bit, eager)
        return written + self.read_alike(share * self.work.prompt_tokens) + (_COMPILE_SECONDS if self.compiles() else 0)

    def rows_at_once(self, asked: Asked, answers: int) -> int:
        """Return the number of rows in a batch, about as `models.batches.choose_batch_size` chooses it."""
        if self.config.generation.batch_size != "auto":
            return min(self.config.generation.batch_size, answers)
        weights = 2 * self.model.parameters if self.unpacks_once() else self.model.base_bytes
        row = self.model.cache_bytes * (self.work.prompt_tokens + asked.new_tokens)
        fits = (self.gpu_gib * GIB - weights) / (row * (1.2 if self.compiles() else 2.5)) if self.speed.gpus else CPU_BATCH
        allowed = MAX_BATCH if self.unpacks_once() or not self.model.in_4bit else ENOUGH
        if not self.compiles() and self.speed.capability == PACKED_CAPABILITY:
            allowed = PACKED_ROWS
        most = int(max(1, min(allowed, fits, answers)))
        return math.ceil(answers / math.ceil(answers / most))  # batches of equal size

    def ask(self, asked: Asked) -> float:
        """Return the time of all answers of one model in notebook 02 or 06."""
        return self.answer(self.work.asked_mcq) + self.read_alike(self.work.option_tokens) + self.answer(asked)

    # --- 06 and 07 -----------------------------------------------------------------------------------------------

    def compare(self) -> float:
        """Return the time of the intervals, and of the 16-bit base's loss if it is measured."""
        settings, held_out = self.config.evaluation, self.work.held_out_rows * self.work.row_tokens
        loss = self.load_again() + self.read(held_out) if settings.base_16bit_loss else 0.0
        return loss + _PER_RESAMPLE * settings.n_resamples / self.speed.small_steps

    def export(self) -> float:
        """Return the time of the merge, its check, and the merged model's answers."""
        settings, moved = self.config.evaluation, _MERGE * self.model.parameters / _DISK
        rows = self.config.export.check_rows * 2 + (self.work.held_out_rows if settings.measure_merged else 0)
        tokens = self.work.check_tokens + 64  # 64 for the answer at the end
        written = tokens * self.step(1, self.work.prompt_tokens, in_16bit=True, eager=True)
        # By default, a model that does not fit on the GPUs is asked nothing.
        asks = settings.merged_questions is not None or not self.spilled_bytes()
        answered = self.answer(self.work.asked_merged, in_16bit=True) if asks else 0.0
        return moved + 2 * self.load_again() + self.read(rows * self.work.row_tokens) + written + answered


# --- in words ------------------------------------------------------------------------------------------------------


def estimate_table(estimate: SeriesEstimate) -> pd.DataFrame:
    """Return a table of the time of each notebook and of all seven, with the band."""
    import pandas as pd

    lines = estimate.steps | {"all seven": estimate.total}
    return pd.DataFrame({f"time on {estimate.speed.where}": {step: describe_time(one) for step, one in lines.items()}})


def describe_rest(run: Run, names: Iterable[str], force: bool = False) -> list[str]:
    """Return a line on the time that these notebooks will take together: those that are not done, and those that read what they
    make. The list is empty for fewer than two notebooks, or if notebook 01 could not tell their time."""
    to_run: list[str] = []
    certain = True  # what a notebook makes anew may be the same as before, and then those that read it are skipped
    for name in names:
        sources = {ARTIFACTS[source].step for made in run.makes(name) for source in ARTIFACTS[made].inputs}
        is_due = force or run.step_state(name, deep=False) != "done"
        if is_due or not sources.isdisjoint(to_run):
            to_run.append(name)
            certain &= is_due
    estimates = [estimate for name in to_run if (estimate := run.estimate(name))]
    if len(to_run) < 2 or len(estimates) < len(to_run):
        return []
    total = add_times(estimates)
    return [
        f"{'' if certain else 'up to '}{len(to_run)} notebooks to run: {describe_time(total)}, {describe_end(total, time.time())}"
    ]


def describe_sessions(estimate: SeriesEstimate, config: RunConfig, on_kaggle: bool | None = None) -> str:
    """Return one line with the total time and, on Kaggle, whether it fits a session and the weekly quota, and what to set if not.

    `on_kaggle`: whether the series runs there; by default, whether this machine is Kaggle's."""
    total = estimate.total
    line = f"all seven notebooks: about {describe_time(total)}, {estimate.speed.how}"
    if not (platform_name() == "kaggle" if on_kaggle is None else on_kaggle) or not estimate.speed.gpus:
        return line
    limit = config.training.max_hours
    session = min(limit or SESSION_HOURS, SESSION_HOURS)
    line += f"; a session has {SESSION_HOURS} h, a week {WEEKLY_HOURS} h of GPU time"
    if total["high"] / 3600 <= session:
        return f"{line}: one session is enough"
    sessions = math.ceil(total["seconds"] / 3600 / session)
    many = f"about {sessions} sessions" if sessions > 1 else "one session may not be enough"
    week = f", and more than a week's {WEEKLY_HOURS} h" if total["seconds"] / 3600 > WEEKLY_HOURS else ""
    longest = max(estimate.steps, key=lambda step: estimate.steps[step]["seconds"])
    less = "training.max_steps or dataset.num_rows" if longest == "05_training" else _FEWER_ANSWERS
    do = f"{longest} takes longest: lower {less}"
    pauses = "The series pauses" if limit else "Set training.max_hours=10, and the series pauses"
    resumes = "in time, and a next session resumes it (medcot kaggle build --continue-from)"
    return f"{line}: {many}{week}. {pauses} {resumes}. {do}"
