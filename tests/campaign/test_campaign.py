"""Generated cases against the whole series: no traceback, no lost result, one clear line for each refusal.

`make campaign` draws a seed and prints it. MEDCOT_SEED is that seed; MEDCOT_CASES and MEDCOT_SERIES are how many cases each part
draws."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import generated
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from medcot_utils.cli import main as cli
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series import runner
from medcot_utils.series.preflight import preflight

MEDCOT = Path(sys.executable).with_name("medcot")
SEED = int(os.environ.get("MEDCOT_SEED") or 1)
CASES = int(os.environ.get("MEDCOT_CASES") or 180)
SERIES = int(os.environ.get("MEDCOT_SERIES") or 20)
PARTS = 10  # of the series, for several workers
ENDS: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def _told():
    yield
    print(f"SEED={SEED}, exit codes of this worker's cases: {dict(ENDS)}")


def campaign(examples, *phases):
    """The settings of a campaign: so many cases of this seed, and the case that fails is printed."""
    chosen = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, *phases],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return lambda test: seed(SEED)(chosen(test))


def tree(folder):
    """{path: digest} of all files below a folder, but for locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def check_refusal(errors, case):
    """One line from the project, the last one, that says more than a type of exception; libraries may have warned before it."""
    lines = errors.strip().splitlines()
    ours = [line for line in lines if line.startswith("medcot: ")]
    assert "Traceback" not in errors and ours == lines[-1:], (case, errors)
    told = ours[0].removeprefix("medcot: ")
    assert len(told) > 20 and not re.search(r"\b(KeyError|TypeError|ValueError|AttributeError|IndexError|Arrow\w+)\b", told), (
        case,
        told,
    )


@functools.cache
def tokenizer_of(model):
    from medcot_utils.models import load_tokenizer

    return load_tokenizer(model)


def prepare(run, *_):
    """What notebooks 01 and 03 do with a run before anything is trained."""
    import datasets

    from medcot_utils import data

    datasets.disable_progress_bars()
    preflight(run.config, run.path)
    config, tokenizer = run.config, tokenizer_of(run.config.model)
    rows, _ = data.validate_rows(data.load_rows(config.dataset), tokenizer.all_special_tokens)
    train, held_out = data.split_rows(rows, config.dataset, config.seed)
    repeats = data.find_repeats(train, list(held_out), config.dataset)
    train = data.drop_repeats(train, repeats) if config.dataset.repeats == "drop" else train
    for part in (train, held_out):
        text = data.add_text_column(part, tokenizer.eos_token)
        tokens, lengths = data.tokenize_rows(
            text, tokenizer, config.dataset, config.model.max_seq_length, config.prompt.newline_after_think
        )
        data.check_labels(tokens, tokenizer, lengths.truncated)
    return run


def call_here(monkeypatch, capfd, *arguments):
    """(exit code, stderr) of a `medcot` command in this process."""
    monkeypatch.setattr(sys, "argv", ["medcot", *map(str, arguments)])
    capfd.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    return code, capfd.readouterr().err


@campaign(CASES, Phase.shrink)
@given(
    rows=st.none() | generated.row_files(),
    odd=st.just([]) | st.just([]) | st.lists(generated.any_setting(), max_size=2),
    usual=generated.usual_settings(),
    place=st.sampled_from(generated.PLACES),
    environment=generated.ENVIRONMENT,
)
def test_preparation_succeeds_or_is_refused_in_one_line(rows, odd, usual, place, environment, tmp_path_factory):
    case = (rows, odd, usual, place, environment)
    folder = tmp_path_factory.mktemp("case")
    chosen = [*usual, *(rows.write(folder) if rows else ["dataset.num_rows=12"]), *odd]
    words = [word for setting in chosen for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch, CapturedStreams() as capfd:
        patch.chdir(folder)
        patch.setattr(runner, "_run_steps", prepare)
        patch.setenv("COLUMNS", "200")
        for name, value in environment.items():
            patch.setenv(name, value)
        code, errors = call_here(patch, capfd, "run", f"--run-dir={place}", "--profile", "smoke", *words)
        ENDS[f"preparation: {code}"] += 1
        assert code in (0, 1, 2), (case, errors)
        if code == 1:
            check_refusal(errors, case)
        elif code == 0:  # a second call with a wrong setting changes nothing
            before = tree(folder)
            assert Run.open(folder / place).config.training.max_steps
            assert call_here(patch, capfd, "run", f"--run-dir={place}", "--set", "training.max_steps=0")[0] == 1
            assert tree(folder) == before, case


class CapturedStreams:
    """stderr of one case, by descriptor; hypothesis wants no fixture of a function's scope."""

    def __enter__(self):
        from _pytest.capture import FDCapture

        self.capture = FDCapture(2)
        self.out = FDCapture(1)
        self.capture.start()
        self.out.start()
        return self

    def __exit__(self, *_):
        self.capture.done()
        self.out.done()

    def readouterr(self):
        self.out.snap()
        return type("Read", (), {"err": self.capture.snap()})


def run_medcot(folder, environment, *arguments):
    # Without the warnings of libraries that Python compiles anew.
    ours = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    given_environment = {**os.environ, **ours, **environment}
    command = [str(MEDCOT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=given_environment, capture_output=True, text=True, timeout=900, check=False)


def states(run_dir):
    """{step: state} and {artifact's file: digest} of a run."""
    run = Run.open(run_dir)
    kept = {name: digest for name, digest in tree(run_dir).items() if not name.startswith(("notebooks", "manifest"))}
    return {name: run.step_state(name) for name in STEPS}, kept


@pytest.mark.parametrize("part", range(PARTS))
def test_a_series_ends_well_or_in_one_line_and_loses_nothing(part, tmp_path_factory):
    tidy = generated.row_files(least=8, tidy=True)

    @campaign(max(1, SERIES // PARTS))
    @given(
        rows=st.none() | tidy | tidy | generated.row_files(),
        usual=generated.usual_settings(),
        place=st.sampled_from(generated.PLACES),
        environment=generated.ENVIRONMENT,
        salt=st.just(part),
    )
    def one(rows, usual, place, environment, salt):
        case = (rows, usual, place, environment)
        folder = tmp_path_factory.mktemp("case")
        chosen = [*usual, *(rows.write(folder) if rows else ["dataset.num_rows=8", "dataset.held_out_rows=4"])]
        if not rows:
            chosen += ["evaluation.num_questions=4"]
        words = [word for setting in chosen for word in ("--set", setting)]
        done = run_medcot(folder, environment, "run", f"--run-dir={place}", "--profile", "smoke", *words)
        ENDS[f"series: {done.returncode}"] += 1
        assert done.returncode in (0, 1, 2), (case, done.stderr)
        if done.returncode == 1:
            check_refusal(done.stderr, case)
        if not (folder / place / "config.json").exists():
            assert done.returncode, case
            return
        ends, kept = states(folder / place)
        finished = [name for name, state in ends.items() if state == "done"]
        assert (len(finished) == len(STEPS)) == (done.returncode == 0), (case, ends, done.stderr)
        again = run_medcot(folder, environment, "run", f"--run-dir={place}")
        assert again.returncode == done.returncode, (case, again.stderr)
        assert again.stdout.count("done before") == len(finished), (case, again.stdout)
        ends_again, kept_again = states(folder / place)
        assert {name: kept_again.get(name) for name in kept} == kept and ends_again == ends, case

    one = seed(SEED + part)(one)
    one()
