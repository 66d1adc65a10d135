"""`medcot kaggle build` says how long the series will take there, from published rates."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from medcot_utils.cli import kaggle
from medcot_utils.run.artifacts import STEPS


@pytest.fixture
def build(monkeypatch, tmp_path):
    monkeypatch.setattr(kaggle.console, "width", 200)
    monkeypatch.setattr("medcot_utils.machine.disk._folder_or_hub_bytes", lambda *asked: None)

    def run(*arguments):
        done = CliRunner().invoke(kaggle.app, ["build", "--folder", str(tmp_path), *arguments])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    return run


@pytest.mark.parametrize("profile", ["article", "auto", "small"])
def test_build_shows_the_hours_of_each_notebook_as_an_estimate(build, profile):
    said = build("--profile", profile)
    assert "time on 2 x Tesla T4: an estimate from published rates" in said
    assert all(step in said for step in (*STEPS, "all seven")) and "one session is enough" in said


def test_build_says_that_a_session_will_not_do(build):
    said = build("--profile", "full")
    assert "one session may not be enough. The series pauses in time, and a next session resumes it (medcot kaggle build" in said
    assert "--continue-from). 05_training takes longest: lower training.max_steps" in said
    assert "about 2 sessions. The series" in build("--profile", "full", "--set", "training.num_processes=1")


@pytest.mark.parametrize(("profile", "limited"), [("small", False), ("article", False), ("full", True)])
def test_only_a_run_as_long_as_a_session_gets_a_limit(build, profile, limited):
    assert ("added: training.max_hours=10, because" in build("--profile", profile)) is limited


def test_a_run_of_unknown_length_gets_a_limit(build):
    assert "added: training.max_hours=10" in build("--profile", "small", "--accelerator", "NvidiaTeslaA100")


def test_build_for_a_cpu_says_why_it_tells_no_time(build):
    said = build("--profile", "demo")
    assert (
        "time on 2 x" not in said and "no time estimate: published rates exist only for NvidiaTeslaT4, not for a session" in said
    )


def test_build_of_a_model_of_unknown_size_says_so(build):
    assert "no time estimate" in build("--profile", "article", "--set", "model.name=me/unknown")


def test_build_for_gpus_without_published_rates_tells_no_time(build):
    said = build("--profile", "article", "--accelerator", "NvidiaTeslaA100")
    assert "not for NvidiaTeslaA100" in said and "time on" not in said


def test_the_time_is_that_of_the_settings_built_with(build):
    short, long = (build("--profile", "article", "--set", f"evaluation.num_questions={n}") for n in (5, 50))
    assert short[short.index("all seven") :] != long[long.index("all seven") :]
