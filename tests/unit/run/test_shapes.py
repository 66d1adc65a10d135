"""A run of somebody else whose files hold other types than medcot writes: one line, whatever it is, and never a traceback."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys

import matplotlib.figure
import pytest
import scipy.stats
from computed_once import remembering
from planted_texts import planted_run

from medcot_utils.cli import main
from medcot_utils.cli.grading_page import Desk
from medcot_utils.errors import MedcotError
from medcot_utils.evaluation.report import build_report
from medcot_utils.export.hub.records import file_lines, read_record
from medcot_utils.export.model_card import model_card
from medcot_utils.run.artifacts import ARTIFACTS, PROGRESS
from medcot_utils.run.directory import Run
from medcot_utils.run.files import sha256_of
from medcot_utils.run.journal import Journal
from medcot_utils.run.lock import RunError
from medcot_utils.run.shapes import SHAPES, _adapter
from medcot_utils.series import runner
from medcot_utils.series.status import read_status
from medcot_utils.training.tracking import describe_tracking

OTHERS = (None, "text", ["list"], 7, {"a": {"b": 1}})
GONE = object()
PUSH = {"started": "a", "state": "pushed", "repo_id": "a/b", "layout": "one", "endpoint": "e", "tag": None, "verify_all": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, up to the export check, with every record that may lie in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy.stats, "binomtest", remembering(scipy.stats.binomtest))
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, target, **options: target.write(b"\x89PNG not drawn"))
        run = planted_run(tmp_path_factory.mktemp("stranger") / "run", "typed")
        (run.path / "pushed.json").write_text(json.dumps([PUSH | {"repositories": []}]))
        (run.path / "accounts.json").write_text(json.dumps([{"settings": [], "signatures": []}]))
        yield run


def entries_of(file):
    """(what a file holds as a list of lines or as one value, the entries of it that may be replaced)."""
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        return lines, [(0,), *((0, key) for key in lines[0])]
    value = json.loads(file.read_text())
    return value, [(), *((key,) for key in (value if isinstance(value, dict) else range(len(value))))]


def replaced(value, entry, other):
    if not entry:
        return other
    copy = value.copy()
    if other is GONE:
        del copy[entry[0]]
    else:
        copy[entry[0]] = replaced(value[entry[0]], entry[1:], other)
    return copy


@contextlib.contextmanager
def changed(run, file, entry, other):
    """The run with another value in one entry of a file, and a manifest that knows it so: whoever made the run made that too."""
    manifest = run.path / "manifest.json"
    before = {path: path.read_bytes() for path in (file, manifest)}
    value = replaced(entries_of(file)[0], entry, other)
    lines = value if file.suffix == ".jsonl" else [value]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if file != manifest:
        recorded = json.loads(before[manifest])
        for artifact in (one for one in recorded["artifacts"].values() if one["file"] == file.name):
            artifact["sha256"], artifact["bytes"] = sha256_of(file)
        manifest.write_text(json.dumps(recorded))
    try:
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def status(run):
    found = read_status(opened := Run.open(run.path))
    main._print_status(found, opened)
    json.dumps(found)


def report(run):
    build_report(Run.open(run.path))


def card(run):
    model_card(Run.open(run.path))


def grade(run):
    desk = Desk(Run.open(run.path), "ann")
    desk.heading(desk.pairs[0])


def push(run):
    for record in read_record(Run.open(run.path)):
        file_lines(record)


READERS = {
    **{ARTIFACTS[name].file: [lambda run, name=name: Run.open(run.path).read(name)] for name in SHAPES},
    "metrics.json": [status, report, card],
    "merged_metrics.json": [status, report],
    "questions.jsonl": [report, grade],
    "base_answers.jsonl": [report, grade],
    "merged_answers.jsonl": [report],
    "data_report.json": [report, card],
    "plan.json": [report, card],
    "training_log.jsonl": [report],
    "export_check.json": [card],
    "manifest.json": [status, lambda run: runner.plan_config(run.path, None, [])],
    "config.json": [status],
    "accounts.json": [status],
    "grades.jsonl": [grade],
    "tracking.json": [lambda run: describe_tracking(Run.open(run.path))],
    "pushed.json": [push],
}


@pytest.mark.simulation
@pytest.mark.parametrize("name", [name for name in READERS if name not in ("machine.json", "gguf_check.json")])
def test_a_file_of_other_types_is_one_line(name, run):
    file, refused = run.path / name, []
    _, entries = entries_of(file)
    for entry, other in itertools.product(entries, (*OTHERS, GONE)):
        if entry or other is not GONE:
            with changed(run, file, entry, other):
                for read in READERS[name]:
                    try:
                        read(run)
                    except MedcotError as error:  # and nothing else
                        refused.append(str(error))
    assert [line for line in refused if "\n" in line or (file.stem not in line and "is not what medcot writes" in line)] == []
    assert len(refused) >= (len(entries) if name not in ("accounts.json", "grades.jsonl", "tracking.json") else 0)


@pytest.mark.parametrize("command", ["status", "report"])
def test_the_command_prints_that_line_and_no_traceback(command, run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["medcot", command, str(run.path)])
    with changed(run, run.path / "metrics.json", ("n_questions",), "all of them"), pytest.raises(SystemExit):
        main.main()
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if not line.startswith("run/config.json: ignored")]
    assert "run/metrics.json, n_questions is 'all of them': input should be" in line and "Traceback" not in said.out + said.err


def test_the_line_names_the_file_the_entry_and_what_to_do(run):
    for name, entry, other, expected in (
        (
            "metrics.json",
            ("n_questions",),
            "many",
            "run/metrics.json, n_questions is 'many': input should be a valid integer. It",
        ),
        ("questions.jsonl", (0, "Question"), 7, "run/questions.jsonl, line 1, Question is 7: input should be a valid string. It"),
        ("plan.json", ("rows",), "117", "run/plan.json, rows is '117': input should be a valid integer. It is not what medcot"),
        ("data_report.json", (), [], "run/data_report.json is []: input should be a valid dictionary. It is not what medcot"),
        ("metrics.json", ("metrics",), {"a": {}}, "run/metrics.json, metrics.a.[key] is 'a': value error, expected the name"),
    ):
        with changed(run, run.path / name, entry, other), pytest.raises(RunError) as caught:
            Run.open(run.path).read(name.partition(".")[0])
        assert str(caught.value).startswith(expected)
        assert "remove it and make it again or, if the run is somebody else's, ask them for another one" in str(caught.value)


def test_an_entry_that_is_missing_is_named_when_it_is_read(run):
    with changed(run, run.path / "data_report.json", ("repeats",), GONE):
        report = Run.open(run.path).read("data_report")
        assert report["repeats_dropped"] in (True, False)
        with pytest.raises(RunError, match=r"^run/data_report\.json has no entry 'repeats'\. It is not what medcot writes"):
            report["repeats"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_file_that_is_no_json_is_one_line(content, run):
    manifest, file = run.path / "manifest.json", run.path / "plan.json"
    before = {path: path.read_bytes() for path in (file, manifest)}
    file.write_bytes(content)
    recorded = json.loads(before[manifest])
    recorded["artifacts"]["plan"]["sha256"], recorded["artifacts"]["plan"]["bytes"] = sha256_of(file)
    manifest.write_text(json.dumps(recorded))
    try:
        with pytest.raises(RunError, match=r"^run/plan\.json cannot be read \("):
            Run.open(run.path).read("plan")
    finally:
        for path, held in before.items():
            path.write_bytes(held)


@pytest.mark.parametrize("line", [b"7", b"[7]", b'{"id": "a"}', b'[{"id": "a", "sample": "0"}]', b"[nothing]"])
def test_a_journal_of_other_types_is_one_line(line, tmp_path):
    journal = Journal(tmp_path / "base_answers.jsonl.part", "this")
    journal.add([{"id": "a", "sample": 0}])
    with journal.path.open("ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(RunError, match=r"base_answers\.jsonl\.part.* It is not what medcot writes: remove it"):
        journal.read()


def test_every_json_artifact_has_a_shape():
    files = {name for name, artifact in ARTIFACTS.items() if artifact.file.endswith((".json", ".jsonl"))}
    assert files == SHAPES.keys()
    for shape in SHAPES.values():
        _adapter(shape)


def test_an_artifact_that_no_notebook_makes_is_left_alone(run):
    known = json.loads((run.path / "manifest.json").read_text())["artifacts"]
    with changed(run, run.path / "manifest.json", ("artifacts",), known | {"evil": known["metrics"]}):
        Run.check_place(run.path, run.stored)
        status(run)


@pytest.mark.parametrize("entry", [{}, {"pid": -1}, {"pid": 2**70}, {"pid": 2**31 - 1}])
def test_a_running_step_of_no_process_is_one_line_or_none(entry, run):
    steps = {"05_training": {"state": "running"} | entry}
    with changed(run, run.path / "manifest.json", ("steps",), steps):
        try:
            assert Run.open(run.path).step_state("05_training") == "interrupted"
        except RunError as error:
            assert re.match(r"run/manifest\.json cannot be read \(steps\.05_training\.pid: input should be", str(error))
            assert entry["pid"] in (-1, 2**70)


@pytest.mark.parametrize("line", ["7", "{}", "[]", "null", "nothing"])
def test_progress_that_is_none_is_not_said(line, run_factory):
    folder = run_factory().path / "checkpoints" / "x"
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text(f"{line}\n")
    opened = Run.open(folder.parents[1])
    opened.record_step("05_training", state="running", started=0.0)
    assert runner._training_step(opened) == ""
