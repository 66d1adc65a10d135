"""The run directory: opening, whole writes, freshness, and what each damage is answered with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import RunError
from medcot_utils.run.store import CONFIG, MANIFEST
from medcot_utils.series.runner import plan_config


def stale(run: Run) -> set[str]:
    return {name for name in ARTIFACTS if not run.is_fresh(name)}


def leftovers(run: Run) -> list[str]:
    return [path.name for path in run.path.rglob("*") if path.name.endswith((".tmp", ".old"))]


# --- names and links of somebody else's run --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../escaped", "/etc/hostname", "C:\\x", "a\0b", ""])
def test_a_manifest_entry_out_of_the_run_is_refused(run_factory, write_all, name):
    run = write_all(run_factory())
    manifest = run.manifest()
    manifest["artifacts"]["plan"]["file"] = name
    (run.path / MANIFEST).write_text(json.dumps(manifest))
    for call in (run.manifest, lambda: run.require("plan"), run_factory):
        with pytest.raises(MedcotError) as raised:
            call()
        assert str(raised.value).startswith(f"run/manifest.json, artifact 'plan': {name!r} ")
    assert json.loads((run.path / MANIFEST).read_text()) == manifest


@pytest.mark.parametrize(
    "link", [".lock.json", "notebooks", "checkpoints/abc", "tracking/tensorboard", "grades.jsonl", "config.json"]
)
def test_nothing_is_written_through_a_link_out_of_a_run(run_factory, write_all, tmp_path, link):
    run = write_all(run_factory())
    victim = tmp_path / "victim"
    if link == "config.json":
        (run.path / link).rename(victim)
    elif "." in link:
        victim.write_text("own")
    else:
        victim.mkdir()
    before = victim.read_bytes() if victim.is_file() else list(victim.iterdir())
    (run.path / link).parent.mkdir(exist_ok=True)
    (run.path / link).symlink_to(victim)
    config = load_config("smoke", ["training.max_steps=3"])
    calls = (
        lambda: Run.open(run.path),
        lambda: Run.create(run.path, config),
        lambda: Run.create(run.path, config, force=True),
        lambda: plan_config(run.path, None, []),
        lambda: run.begin("01_setup"),
        lambda: run.write("plan", {}),
    )
    for call in calls:
        with pytest.raises(MedcotError, match=rf"^run/{link} is a link out of the run, to {victim}"):
            call()
    assert before == (victim.read_bytes() if victim.is_file() else list(victim.iterdir()))


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_made_run_opens_with_the_same_configuration(run_factory):
    made = run_factory("training.max_steps=3")
    assert Run.open(made.path).config == made.config
    assert Run.open(made.path).manifest() == {"format": 1, "steps": {}, "artifacts": {}}


def test_a_new_run_can_be_read_by_its_user_alone(tmp_path, smoke_config, write_all):
    before = os.umask(0)
    try:
        run = Run.create(tmp_path / "runs" / "mine", smoke_config)
        write_all(run)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (run.path.parent, run.path)] == [0o700, 0o700]
    assert (run.path / CONFIG).stat().st_mode & 0o444 == 0o444, "the folder alone keeps others out"


def test_resuming_a_run_keeps_artifacts_and_takes_new_settings(run_factory, write_all):
    write_all(run_factory())
    again = run_factory("evaluation.n_resamples=600")
    assert again.config.evaluation.n_resamples == Run.open(again.path).config.evaluation.n_resamples == 600
    assert again.read("plan") == {"tag": "first"}


def test_opening_without_a_run_names_notebook_01(tmp_path):
    with pytest.raises(RunError, match=rf"no run in {tmp_path}/empty/: run notebook 01_setup first"):
        Run.open(tmp_path / "empty")


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, smoke_config, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot be written \(.+\): choose another with --run-dir"):
        Run.create(tmp_path / below, smoke_config)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, smoke_config):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="is not empty and is not a run"):
        Run.create(tmp_path, smoke_config, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("force", [False, True])
def test_a_model_folder_with_a_config_json_is_not_a_run(tmp_path, smoke_config, force):
    (tmp_path / CONFIG).write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        Run.create(tmp_path, smoke_config, force)
    assert "architectures" in (tmp_path / CONFIG).read_text()


@pytest.mark.parametrize(
    ("other", "named"), [({"profile": "demo"}, "profile 'smoke', not 'demo'"), ({"overrides": ["model.name=x"]}, "not 'x'")]
)
def test_another_profile_or_model_is_refused_unless_forced(run_factory, other, named, write_all):
    write_all(run_factory())
    overrides, kind = other.get("overrides", []), {"profile": other.get("profile", "smoke")}
    with pytest.raises(RunError, match=named):
        run_factory(*overrides, **kind)
    forced = run_factory(*overrides, **kind, force=True)
    assert Run.open(forced.path).config == load_config(kind["profile"], overrides)
    assert {"base_answers", "adapter", "merged"} <= stale(forced)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"profile": "smoke"}', pytest.param("[" * 100_000, id="too deep")])
def test_force_fixes_an_unreadable_configuration(run_factory, text):
    run = run_factory()
    (run.path / CONFIG).write_text(text)
    for call in (lambda: Run.open(run.path), run_factory):
        with pytest.raises(RunError, match=r"run/config\.json cannot be read .*--force"):
            call()
    run_factory(force=True)
    assert Run.open(run.path).config == run.config


def test_a_token_in_config_json_names_file_and_setting(run_factory):
    run, token = run_factory("tracking.entity=someone"), "hf_" + "aB" * 17
    (run.path / CONFIG).write_text((run.path / CONFIG).read_text().replace("someone", token))
    with pytest.raises(
        RunError, match=r"run/config\.json cannot be read \(setting tracking\.entity holds what looks like"
    ) as caught:
        Run.open(run.path)
    assert token[8:] not in str(caught.value)


ODD_MANIFESTS = {
    "no UTF-8": b'{"format": 1, "steps": {}, "artifacts": {"\xe9": {}}}',
    "UTF-16": '{"format": 1, "steps": {}, "artifacts": {}}'.encode("utf-16"),
    "too deep": b'{"format": 1, "steps": ' + b"[" * 100_000,
    "too large": b" " * 10_000_001,
    "no steps": b'{"format": 1, "artifacts": {}}',
    "steps as a list": b'{"format": 1, "steps": [], "artifacts": {}}',
    "a step as a text": b'{"format": 1, "steps": {"01_setup": "done"}, "artifacts": {}}',
    "an artifact without a digest": b'{"format": 1, "steps": {}, "artifacts": {"machine": {"file": "machine.json"}}}',
}


@pytest.mark.parametrize("kind", ODD_MANIFESTS)
def test_a_manifest_of_any_other_shape_is_one_clear_error(run_factory, kind):
    run = run_factory()
    (run.path / MANIFEST).write_bytes(ODD_MANIFESTS[kind])
    with pytest.raises(RunError, match=r"^run/manifest\.json cannot be read \([^\n]*\): run notebook 01_setup again$"):
        Run.open(run.path).step_state("01_setup")
    assert stale(run_factory()) == set(ARTIFACTS)


def test_a_byte_order_mark_in_a_runs_records_is_read_over(run_factory):
    run = run_factory()
    for name in (CONFIG, MANIFEST):
        (run.path / name).write_bytes(b"\xef\xbb\xbf" + (run.path / name).read_bytes())
    assert Run.open(run.path).config == run.config
    assert Run.open(run.path).step_state("01_setup") == "not run"


@pytest.mark.parametrize("text", ["", '{"steps": {', "null", "{}"])
def test_an_unreadable_manifest_names_notebook_01_which_mends_it(run_factory, text, write_all):
    run = write_all(run_factory())
    (run.path / MANIFEST).write_text(text)
    with pytest.raises(RunError, match=r"run/manifest\.json cannot be read .*: run notebook 01_setup again"):
        Run.open(run.path).step_state("01_setup")
    again = run_factory()
    assert stale(again) == set(ARTIFACTS)
    assert not stale(write_all(again))


# --- whole or not at all -----------------------------------------------------------------------------------------------


def _fill_half_and_raise(path: Path) -> None:
    (path / "weights.bin" if path.is_dir() else path).write_text("half")
    raise MemoryError("no more")


@pytest.mark.parametrize("name", ["adapter", "plan", "questions"])
def test_a_failed_write_keeps_the_old_artifact_and_manifest(run_factory, name, write_all, content):
    run = write_all(run_factory())
    before, old = run.manifest(), content(name, "first")
    with pytest.raises(MemoryError):
        run.write(name, _fill_half_and_raise)
    assert run.manifest() == before
    assert leftovers(run) == []
    kept = Run.open(run.path).read(name)
    assert (kept / "weights.bin").read_text() == "adapter first" if name == "adapter" else kept == old


def test_data_that_is_not_json_leaves_no_part_of_a_file(run_factory, write_all, content):
    run = write_all(run_factory())
    with pytest.raises(TypeError):
        run.write("questions", [{"id": 1}, {"id": object()}])
    assert Run.open(run.path).read("questions") == content("questions", "first")
    assert leftovers(run) == []


def test_a_kill_during_a_write_keeps_the_old_artifact(run_factory, write_all):
    run = write_all(run_factory())
    script = (
        "import os, signal, sys\nfrom medcot_utils.run.directory import Run\n"
        "def fill(path):\n (path / 'weights.bin').write_text('half')\n os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.open(sys.argv[1]).write('adapter', fill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(run.path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    again = Run.open(run.path)
    assert not stale(again)
    assert (again.read("adapter") / "weights.bin").read_text() == "adapter first"


def test_writing_a_folder_anew_leaves_nothing_of_the_old_one(run_factory, write_all):
    run = write_all(run_factory())
    run.write("adapter", lambda folder: (folder / "other.bin").write_text("new"))
    assert [path.name for path in run.read("adapter").iterdir()] == ["other.bin"]
    assert leftovers(run) == []


@pytest.mark.parametrize("text", ["é — 😀", "line\u2028paragraph\u2029next\x85feed\x0c", 'quote " \\ \r\n\t'])
def test_any_text_comes_back_from_a_jsonl_as_it_went_in(run_factory, text):
    run = run_factory()
    run.write("questions", [{"Question": text}, {"Question": "next"}])
    assert Run.open(run.path).read("questions") == [{"Question": text}, {"Question": "next"}]


def test_a_parquet_written_anew_is_not_read_from_a_cache(run_factory, write_all, content):
    run = write_all(run_factory())
    run.read("train_rows")
    run.write("train_rows", content("train_rows", "second"))
    assert run.read("train_rows")["tag"] == ["second"]


def test_an_artifact_is_not_written_before_what_it_is_made_from(run_factory):
    with pytest.raises(RunError, match=r"questions\.jsonl is not in run/ yet: run notebook 02_baseline_inference first"):
        run_factory().write("base_answers", [])


# --- missing, truncated, altered ---------------------------------------------------------------------------------------

DAMAGED = ["questions", "train_rows", "adapter", "metrics", "report"]


def _file_of(run: Run, name: str) -> Path:
    path = run.path / ARTIFACTS[name].file
    return path / "weights.bin" if path.is_dir() else path


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "truncated"),
        (lambda path: path.write_bytes(b"#" + path.read_bytes()[1:]), "altered"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "altered"),
    ],
    ids=["cut", "same size", "longer"],
)
def test_damage_is_one_error_that_names_the_notebook(run_factory, name, damage, said, write_all):
    damage(_file_of(write_all(run_factory()), name))
    run = run_factory()
    with pytest.raises(
        RunError, match=rf"{ARTIFACTS[name].file} in run/ is {said} .*: run notebook {ARTIFACTS[name].step} again"
    ):
        run.read(name)
    assert not run.is_fresh(name)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_missing_artifact_is_one_error_that_names_the_notebook(run_factory, name, write_all):
    run = write_all(run_factory())
    (run.path / ARTIFACTS[name].file).rename(run.path / "elsewhere")
    with pytest.raises(
        RunError, match=rf"{ARTIFACTS[name].file} is missing from run/: run notebook {ARTIFACTS[name].step} again"
    ):
        run.require(name)
    assert not run.is_fresh(name)


def test_a_step_does_not_begin_on_a_damaged_input(run_factory, write_all):
    _file_of(write_all(run_factory()), "adapter").write_text("###############")
    run = run_factory()
    with pytest.raises(RunError, match="run notebook 05_training again"):
        run.begin("07_export")
    assert run.step_state("07_export") == "not run"


def test_a_shown_path_does_not_tell_the_machines_folders(run_factory, tmp_path, monkeypatch):
    run = run_factory()
    path = run.write("machine", {})
    assert run.display(path) == "run/machine.json"
    monkeypatch.chdir(tmp_path.parent)  # a command's folder, with the run below it
    assert run.display(path) == f"{tmp_path.name}/run/machine.json"
    with pytest.raises(RunError, match=rf"questions\.jsonl is not in {tmp_path.name}/run/ yet"):
        run.read("questions")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # that of a notebook opened by hand
    assert run.display(path) == "run/machine.json"


def test_notebook_01_says_where_the_run_is_and_no_time(run_factory, tmp_path, monkeypatch, capsys):
    run = run_factory()
    estimate = {step: {"seconds": 240.0, "low": 180.0, "high": 330.0} for step in STEPS}
    run.write("machine", {"estimate": estimate})
    monkeypatch.chdir(tmp_path.parent)
    run.begin("01_setup")
    assert capsys.readouterr().out == f"run directory: {tmp_path.name}/run\n"
