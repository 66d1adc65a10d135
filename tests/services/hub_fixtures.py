"""Fixtures of the tests of the Hub: the server, a finished run, and `medcot push` as its user calls it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hub_runs import hub_environment, make_run, push_command
from hub_server import WRITE, Hub

from medcot_utils.run.directory import Run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def finished_run(tmp_path: Path) -> Callable[..., Run]:
    """`finished_run("dataset.name=…", weights=30_000_000)`: as `make_run`, in the test's own folder."""
    return partial(make_run, tmp_path)


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`push(run, "--public")`: `medcot push` in a process of its own, to the test's Hub."""

    def call(run: Run, *options: str, repo_id: str = "doctor/cot", token: str | None = WRITE, **variables: str):
        environment = hub_environment(hub.url, tmp_path / "home", token) | variables
        command = push_command(run, *options, repo_id=repo_id)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return call
