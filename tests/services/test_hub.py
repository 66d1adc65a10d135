"""`medcot push` with the real Hub client over HTTP: what arrives is what the run holds, or it is not called pushed."""

from __future__ import annotations

import json

import pytest
from hub_server import FOREIGN, READ, WRITE
from huggingface_hub import ModelCard


def files_of(hub, repo_id, revision="main"):
    repo = hub.repos["model", repo_id]
    wanted = repo["tags"].get(revision, repo["commits"][-1]["id"])
    return next(commit["files"] for commit in repo["commits"] if commit["id"] == wanted)


def test_smoke(hub, finished_run, push):
    run = finished_run(weights=30_000_000)
    done = push(run)
    print(done.stdout, done.stderr)
    print(hub.requests)
    print(hub.blobs[files_of(hub, "doctor/cot")["README.md"]["sha256"]].decode())
    assert done.returncode == 0
    done = push(run)
    print(done.stdout, done.stderr)
    assert 0
