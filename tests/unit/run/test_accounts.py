"""A run's settings give no orders about accounts: those of somebody else's run, and what a user's own runs keep."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from medcot_utils.cli.main import app
from medcot_utils.config import PROFILES, load_config, overrides_of
from medcot_utils.export.hub import push
from medcot_utils.machine.secrets import SECRET_NAMES
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.changes import describe_new_settings
from medcot_utils.run.directory import Run
from medcot_utils.run.store import CONFIG
from medcot_utils.series import notebook, runner
from medcot_utils.training.tracking import choose_tracker

KEY = "0123456789abcdef0123456789abcdef01234567"
ORDERS = (
    "hub.repo_id=mallory/cot",
    "hub.private=false",
    "tracking.backend=wandb",
    "tracking.mode=online",
    "tracking.entity=mallory",
    "tracking.project=taken",
    "secrets.wandb=BANK_PIN",
    "secrets.huggingface=BANK_PIN",
)
GIVEN = ("hub.repo_id=ann/cot", "tracking.entity=hospital")


@pytest.fixture
def foreign(run_factory, monkeypatch):
    """`foreign(*settings)`: the folder of a run that somebody else has made with these settings."""

    def make(*settings, name="run", profile="smoke"):
        with monkeypatch.context() as patch:
            patch.setenv("MEDCOT_KEY", "the key of somebody else")
            patch.delenv("WANDB_API_KEY", raising=False)  # of this user, which would sign too
            return run_factory(*(settings or ORDERS), name=name, profile=profile).path

    return make


@pytest.fixture
def never_run(monkeypatch):
    monkeypatch.setattr(runner, "_run_notebook", lambda run, started, *more: pytest.fail(f"{started.stem} was started"))


def finish(run):
    for step in STEPS:
        run.record_step(step, state="done", seconds=1.0, peak_memory_mb=1)


def states(path):
    return {Run.open(path).step_state(step) for step in STEPS}


# --- somebody else's run ---------------------------------------------------------------------------------------------


def test_a_foreign_run_reads_no_variable_that_it_names(foreign, monkeypatch):
    monkeypatch.setenv("BANK_PIN", "the number of my account")
    notebook._hand_on_secrets(foreign())
    assert "WANDB_API_KEY" not in os.environ and "HF_TOKEN" not in os.environ


def test_a_foreign_run_is_not_pushed(foreign, monkeypatch, capsys):
    monkeypatch.setattr(push, "push_run", lambda *given: pytest.fail("pushed"))
    assert push.publish(Run.open(foreign())) is None
    assert "not pushed" in capsys.readouterr().out
    settings = push.hub_settings(Run.open(tmp := foreign(name="other")), repo_id="ann/cot")
    assert (settings.repo_id, settings.private) == ("ann/cot", True), f"{tmp}: public only if the call says so"


def test_a_foreign_run_is_tracked_nowhere_else(foreign, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = Run.open(foreign()).config
    assert choose_tracker(config).backend == "none" and config.tracking.mode == "offline"
    assert (config.tracking.entity, config.tracking.project) == (None, "medcot")


@pytest.mark.parametrize("order", ["tracking.backend=wandb", "tracking.backend=auto", "tracking.mode=online"])
def test_a_foreign_run_is_not_tracked_online(order, foreign, monkeypatch, capsys):
    path = foreign(*([] if "wandb" in order else ["tracking.backend=auto"]), *([] if "auto" in order else [order]))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    choice = choose_tracker(Run.open(path).config)
    assert choice.backend == "none", "as its profile says"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--set {order}" in said and order.partition("=")[0] in said
    Run.create(path, runner.plan_config(path, None, ["tracking.backend=auto"])[0])
    assert choose_tracker(Run.open(path).config).backend == "wandb", "the user's own word"


@pytest.mark.parametrize("profile", [None, "demo"])
def test_a_foreign_run_of_the_defaults_is_tracked_offline(profile, foreign, monkeypatch, capsys):
    path = foreign("seed=1", profile="demo")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for settings in (["seed=1"], ["seed=1", "hub.repo_id=ann/cot"], ["seed=1", "training.max_steps=3"]):
        Run.create(path, runner.plan_config(path, profile, settings)[0])
        choice = choose_tracker(Run.open(path).config)
        assert (choice.backend, choice.mode) == ("wandb", "offline")
        assert Run.open(path).stored.tracking == load_config("demo").tracking
    (line, _) = dict.fromkeys(capsys.readouterr().err.splitlines())  # and one without the push, once the call gives that
    assert line == (
        "run/config.json: ignored tracking.backend, because you did not set it; nothing is pushed and Weights & Biases stays "
        "offline. To use it: --set tracking.backend=wandb (in notebook 01: OVERRIDES; medcot push: --repo-id)"
    )


@pytest.mark.parametrize("given", ["tracking.backend=wandb", "tracking.mode=online", "tracking.project=mine"])
def test_a_foreign_run_of_the_defaults_is_tracked_if_asked(given, foreign, monkeypatch, capsys):
    path = foreign("seed=1", profile="demo")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    Run.create(path, runner.plan_config(path, None, [given])[0])
    capsys.readouterr()
    for settings in ([], ["training.max_steps=3"]):
        Run.create(path, runner.plan_config(path, None, settings)[0])
        assert choose_tracker(Run.open(path).config).mode == "online", "as this user said once"
    assert capsys.readouterr().err == ""


def test_without_a_key_the_line_is_left_out(foreign, capsys):
    path = foreign("seed=1", profile="demo")
    assert choose_tracker(Run.open(path).config).backend == "trackio" and capsys.readouterr().err == ""


@pytest.mark.parametrize("order", ["tracking.backend=tensorboard", "tracking.mode=offline"])
def test_what_sends_nothing_counts_in_any_run(order, foreign, capsys):
    assert Run.open(foreign(order)).config == load_config("smoke", [order])
    assert capsys.readouterr().err == ""


def test_medcot_run_takes_no_orders_of_a_foreign_run(foreign, monkeypatch, capsys):
    path = foreign()
    monkeypatch.setenv("BANK_PIN", KEY)
    before = Run.open(path).config
    config, _ = runner.plan_config(path, None, ["training.max_steps=3"])
    assert describe_new_settings(before, config) == ["training.max_steps 6 -> 3"]
    run = Run.create(path, config)  # as `run_series` does, and notebook 01 in its kernel
    run = Run.create(path, load_config("smoke", overrides_of(run.config)))
    for opened in (run, Run.open(path)):
        assert opened.config.hub == load_config("smoke").hub and opened.config.training.max_steps == 3
        assert opened.config.secrets.wandb == SECRET_NAMES["Weights & Biases"]
        assert (opened.config.tracking.entity, opened.config.tracking.mode) == (None, "offline")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(
        "run/config.json: ignored hub.repo_id, hub.private, tracking.backend, tracking.project, tracking.entity, tracking.mode"
    )
    assert "because you did not set them; nothing is pushed and Weights & Biases stays offline. To use them: --set" in line
    assert "--set hub.repo_id=mallory/cot --set hub.private=false --set" in line


def test_the_line_is_one_line_whatever_it_quotes(foreign, capsys):
    path = foreign("tracking.project=a\x1b[2J\u202eb'; rm -r ~", "tracking.entity=" + "e" * 10_000)
    Run.open(path)
    said = capsys.readouterr().err
    assert said[:-1].isprintable() and len(said) < 600
    assert "tracking.entity=..." in said


def test_status_says_what_is_not_used(foreign):
    shown = CliRunner().invoke(app, ["status", str(foreign()), "--json"])
    assert json.loads(shown.stdout)["profile"] == "smoke" and "because you did not set them" in shown.stderr


def test_a_signature_holds_for_its_own_settings_alone(run_factory, foreign):
    mine = run_factory(*GIVEN, name="mine")
    for settings in (GIVEN, [*GIVEN, "training.max_steps=3"], ["hub.repo_id=ann/cot", "hub.private=false"]):
        path = foreign(*settings, "seed=1", name=f"other-{len(settings)}-{settings[-1][:5]}")
        shutil.copyfile(mine.path / "accounts.json", path / "accounts.json")
        assert Run.open(path).config.hub.repo_id is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"settings": 1, "signatures": []}]', '[{"settings": [], "signatures": [7]}]']
)
def test_a_record_that_is_none_signs_nothing(text, foreign):
    path = foreign()
    (path / "accounts.json").write_text(text)
    assert Run.open(path).config.hub.repo_id is None


def test_an_edited_config_counts_no_more(run_factory):
    run = run_factory(*GIVEN)
    values = json.loads((run.path / CONFIG).read_text())
    values["hub"]["private"] = False
    (run.path / CONFIG).write_text(json.dumps(values))
    config = Run.open(run.path).config
    assert (config.hub.private, config.hub.repo_id) == (True, None)


# --- how to allow it -------------------------------------------------------------------------------------------------


def test_only_what_the_call_gives_counts(foreign, monkeypatch, capsys):
    path = foreign()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config, _ = runner.plan_config(path, None, ["hub.repo_id=ann/cot"])
    Run.create(path, config)
    config = Run.open(path).config
    assert (config.hub.repo_id, config.hub.private) == ("ann/cot", True)
    assert (config.tracking.entity, config.tracking.mode) == (None, "offline")
    capsys.readouterr()
    config, _ = runner.plan_config(path, None, ["tracking.mode=online"])
    Run.create(path, config)
    config = Run.open(path).config
    assert (config.hub.repo_id, config.tracking.mode, config.tracking.entity) == ("ann/cot", "online", None)
    assert "stays offline" not in capsys.readouterr().err.splitlines()[-1]


def test_the_options_of_the_line_allow_everything(foreign, monkeypatch, capsys):
    path = foreign()
    monkeypatch.setenv("BANK_PIN", KEY)
    wanted = Run.open(path).stored
    pairs = [pair.strip(" '") for pair in capsys.readouterr().err.split(" (in notebook")[0].split("--set ")[1:]]
    assert len(pairs) == 8
    Run.create(path, runner.plan_config(path, None, pairs)[0])
    assert Run.open(path).config == wanted and capsys.readouterr().err == ""


# --- the user's own runs ---------------------------------------------------------------------------------------------


def test_own_settings_count_in_every_process_and_place(run_factory, tmp_path, monkeypatch, capsys):
    run = run_factory(*ORDERS)
    monkeypatch.setenv("BANK_PIN", KEY)
    assert run.config == load_config("smoke", ORDERS) == Run.open(run.path).config
    moved = shutil.move(run.path, tmp_path / "elsewhere")
    assert Run.open(moved).config == run.config
    Run.create(moved, runner.plan_config(moved, None, ["training.max_steps=3"])[0])
    assert Run.open(moved).config.hub == run.config.hub
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("profile", PROFILES)
def test_a_run_that_sets_nothing_is_known_as_made_here(profile, run_factory, monkeypatch, capsys):
    run = run_factory(profile=profile)
    monkeypatch.setenv("WANDB_API_KEY", KEY)  # a key that comes later
    assert Run.open(run.path).config == run.config == load_config(profile)
    assert Run.open(run.path).signed == {"tracking.backend"} and capsys.readouterr().err == ""


@pytest.mark.parametrize("first", ["demo", "smoke"])
def test_an_own_run_of_the_defaults_stays_online(first, run_factory, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_factory(profile=first)
    run = run_factory(profile="demo", force=True)
    monkeypatch.setenv("MEDCOT_KEY", "that of the next session")
    for settings in ([], ["training.max_steps=3"]):
        Run.create(run.path, runner.plan_config(run.path, None, settings)[0])
        choice = choose_tracker(Run.open(run.path).config)
        assert (choice.backend, choice.mode) == ("wandb", "online")
    assert capsys.readouterr().err == ""


def test_own_runs_move_between_sessions_with_the_same_token(run_factory, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "7" * 34)
    run = run_factory(*GIVEN)
    monkeypatch.setenv("MEDCOT_KEY", "that of the next session")
    assert Run.open(run.path).config.hub.repo_id == "ann/cot"
    monkeypatch.delenv("HF_TOKEN")
    assert Run.open(run.path).config.hub.repo_id is None


@pytest.mark.parametrize("profile", [None, "smoke"])
def test_a_call_says_of_a_foreign_run_only_what_it_changes(profile, foreign):
    path = foreign("hub.repo_id=mallory/cot")
    config, _ = runner.plan_config(path, profile, ["training.max_steps=3"])
    assert describe_new_settings(Run.open(path).config, config) == ["training.max_steps 6 -> 3"]
    assert config.tracking.mode == Run.create(path, config).config.tracking.mode == "offline"


@pytest.mark.usefixtures("never_run")
def test_an_unsigned_run_of_an_earlier_version_stays_done(run_factory, write_all, capsys):
    run = write_all(run_factory(*GIVEN))
    finish(run)
    (run.path / "accounts.json").unlink()
    before = {name: (run.path / name).read_bytes() for name in (CONFIG, "manifest.json")}
    assert states(run.path) == {"done"}
    for profile in (None, "smoke"):
        config, _ = runner.plan_config(run.path, profile, [])
        runner.run_series(run.path, config, say=lambda line: None)
        assert {name: (run.path / name).read_bytes() for name in before} == before
    assert "ignored hub.repo_id, tracking.entity, because" in capsys.readouterr().err


def test_what_is_made_without_the_settings_is_redone_with_them(foreign, write_all):
    path = foreign(*GIVEN)
    finish(write_all(Run.open(path)))
    assert states(path) == {"done"}
    config, _ = runner.plan_config(path, None, GIVEN)
    Run.create(path, config)
    made = {step for step in STEPS if Run.open(path).step_state(step) != "done"}
    assert made == {"01_setup", "07_export"}, "so that a push that is allowed later takes place"


def test_what_is_made_when_some_settings_count_stays_done(foreign, write_all):
    path = foreign()
    config, _ = runner.plan_config(path, None, ["tracking.entity=hospital"])
    Run.create(path, config)
    finish(write_all(Run.open(path)))
    assert states(path) == {"done"}
    (path / "accounts.json").unlink()  # as on a machine without this user's key
    assert states(path) == {"done"}


def test_settings_that_are_put_back_still_count(run_factory, monkeypatch):
    run = run_factory(*GIVEN)

    def refuse(run, started, *more):
        Run.create(run.path, run.config)
        run.record_step("01_setup", state="failed", error="HubError: no")
        raise runner.SeriesError("refused")

    monkeypatch.setattr(runner, "_run_notebook", refuse)
    with pytest.raises(runner.SeriesError, match="refused"):
        runner.run_series(run.path, load_config("smoke", ["hub.repo_id=ann/other"]))
    assert Run.open(run.path).config.hub.repo_id == "ann/cot"


def test_settings_count_that_an_earlier_version_signed(run_factory):
    from medcot_utils.run.accounts import sign_settings

    run = run_factory(*GIVEN)
    values = json.loads((run.path / CONFIG).read_text())
    del values["evaluation"]["measure_merged"]  # as if it had been added since
    sign_settings(run.path, values, ["hub.repo_id"])
    (run.path / CONFIG).write_text(json.dumps(values))
    config = Run.open(run.path).config
    assert (config.hub.repo_id, config.tracking.entity) == ("ann/cot", None)
