"""Which tracker a run gets, and what is refused in notebook 01."""

from __future__ import annotations

import json

import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import PlatformError, quote
from medcot_utils.training import tracking
from medcot_utils.training.tracking import TrackingError, check_tracker, choose_tracker

KEY = "0123456789abcdef0123456789abcdef01234567"


def config(*overrides, backend="auto"):
    return load_config("smoke", [f"tracking.backend={backend}", *overrides])


def mode_of(backend):
    choice = choose_tracker(config())
    assert choice.backend == backend
    return choice.mode


@pytest.fixture
def without(monkeypatch):
    """`without("trackio")`: as if it were not installed."""

    def leave_out(*names):
        monkeypatch.setattr(tracking, "_installed", lambda backend: backend not in names)

    return leave_out


def test_auto_takes_wandb_with_a_key_else_trackio_else_none(monkeypatch, without):
    assert choose_tracker(config()).backend == "trackio"
    without("trackio")
    assert choose_tracker(config()).backend == "none" and "trackio is not installed" in check_tracker(config())
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode_of("wandb") == "online"
    assert check_tracker(config()) == "tracking: wandb, online (key from environment WANDB_API_KEY), project medcot"
    without("wandb", "trackio")
    assert choose_tracker(config()).backend == "none"


def test_wandb_without_a_key_is_offline_unless_online_is_set():
    assert check_tracker(config(backend="wandb")) == "tracking: wandb, offline (no key was found), project medcot"
    with pytest.raises(PlatformError, match=r"tracking\.mode=online needs a secret for Weights & Biases, and none was found"):
        check_tracker(config("tracking.mode=online", backend="wandb"))


def test_wandbs_own_switch_is_obeyed(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode_of("wandb") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_tracker(config(backend="wandb")).backend == "none"


def test_auto_with_wandb_switched_off_is_not_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_tracker(config()).backend == "trackio"


@pytest.mark.parametrize("backend", ["wandb", "trackio", "tensorboard"])
def test_a_named_tracker_that_is_not_installed_is_an_error(without, backend):
    without(backend)
    with pytest.raises(TrackingError, match=f"tracking.backend is {backend}, which is not installed: pip install {backend}"):
        check_tracker(config(backend=backend))


def test_article_has_its_project_and_job_type_smoke_is_untracked():
    article = load_config("article").tracking
    assert article.project == "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"
    assert article.job_type == "training" and article.backend == "auto"
    assert choose_tracker(load_config("smoke")).backend == "none"


class Recorder:
    """A tracker that notes which tracked run it was opened with."""

    opened = ()  # ids, one after the other

    def open(self, folder, tracked, settings, config):
        Recorder.opened += (tracked["id"],)
        return tracked


def test_online_only_an_own_tracked_run_is_resumed(run_factory, write_all, monkeypatch, capsys):
    run = write_all(run_factory("tracking.backend=wandb"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Recorder)
    monkeypatch.setattr(Recorder, "opened", ())
    for _ in range(2):
        tracking.Session(run)
    mine, state = Recorder.opened[0], run.path / "tracking.json"
    assert Recorder.opened == (mine, mine) and capsys.readouterr().out == ""
    tracked = json.loads(state.read_text())
    for change in ({"id": "victim01"}, {"signatures": []}, {"signatures": [7]}, {"signatures": None}):
        state.write_text(json.dumps(tracked | change))
        tracking.Session(run)
    assert not {mine, "victim01"} & set(Recorder.opened[2:]), "somebody may have put another run's id there"
    assert "tracking.json" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "offline")
    state.write_text(json.dumps(tracked | {"signatures": []}))
    tracking.Session(run)
    assert Recorder.opened[-1] == mine, "nothing is sent, so nothing of another run can be changed"


# --- somebody else's tracking.json ---------------------------------------------------------------------------------------


@pytest.fixture
def tracked(run_factory, write_all):
    """`tracked(name=...)`: a run whose tracking.json is a tracker's own but for these values."""
    run = write_all(run_factory("tracking.backend=tensorboard"))

    def make(**values):
        held = {"backend": "tensorboard", "mode": "", "project": "medcot", "fingerprint": run.fingerprint("adapter")}
        held |= {"id": "0a1b2c3d", "name": "run-0a1b2c3d", "folder": "tracking/tensorboard", "url": ""}
        (run.path / tracking.STATE).write_text(json.dumps(held | values))
        return run

    return make


@pytest.mark.parametrize("name", ["../../../escaped", "/abs/escaped", "a/../../../../escaped", "a/escaped"])
@pytest.mark.parametrize("key", ["name", "id"])
def test_a_tracked_run_named_out_of_the_run_is_refused(tracked, tmp_path, capsys, key, name):
    name = name.replace("/abs", str(tmp_path))
    run = tracked(**{key: name})
    tracking.Session(run).close()
    assert not list(tmp_path.rglob("*escaped*"))
    assert f"tracking ends here (OutsideError: run/tracking.json, {key}: {quote(name)} " in capsys.readouterr().out
    assert tracking.describe_tracking(run).startswith(f"not tracked: run/tracking.json, {key}: {quote(name)} ")


def test_a_tracked_run_of_its_own_name_goes_on(tracked, tmp_path, capsys):
    run = tracked()
    tracking.Session(run).close()
    assert [path.name for path in (run.path / "tracking" / "tensorboard").iterdir()] == ["run-0a1b2c3d-1"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("values", [{"backend": "../x"}, {"folder": 7}, {"url": None}])
def test_a_tracking_json_of_another_shape_is_one_line(tracked, values):
    run = tracked(**values)
    assert "run/tracking.json is not a record of a tracked run: remove it" in tracking.describe_tracking(run)
    (run.path / tracking.STATE).write_text("[" * 100_000)
    assert "run/tracking.json is not a record of a tracked run: remove it" in tracking.describe_tracking(run)
