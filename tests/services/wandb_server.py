"""W&B on the loopback: PyPI's openwandb, and what it holds.

openwandb's licence is for non-commercial use and it is in no requirements file: it is installed for tests alone, into the cache
folder, and a test of it is skipped where that takes longer than a minute or cannot be done."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from medcot_utils.machine import paths

OPENWANDB = "openwandb==0.5.25"


def _installed() -> Path:
    folder = paths.cache_dir() / "tests" / OPENWANDB
    if not (folder / "openwandb").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), OPENWANDB]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{OPENWANDB} was not installed within a minute")
        if done.returncode:
            pytest.skip(f"{OPENWANDB} cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


def _ask(address: str, body: dict, token: str = "") -> dict:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=30) as answer:
        return json.load(answer)


@dataclass(frozen=True)
class WandbServer:
    """Where it answers, a key that it takes, and its database."""

    address: str
    key: str
    database: Path

    def held(self, query: str, *values: str) -> list[tuple]:
        """The rows of the database that a query finds."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query, values).fetchall()


@pytest.fixture(scope="module")
def wandb_server(tmp_path_factory) -> Iterator[WandbServer]:
    """A running openwandb."""
    packages, home = _installed(), tmp_path_factory.mktemp("openwandb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "openwandb", "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(home)]
    environment = os.environ | {"PYTHONPATH": str(packages), "HOME": str(home)}
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            time.sleep(0.2)
        login = _ask(f"{address}/api/v2/auth/login", {"username": "admin", "password": "admin123"})
        key = _ask(f"{address}/api/v2/settings/api-keys", {"name": "test"}, login["token"])["api_key"]["key"]
        yield WandbServer(address, key, home / "openwandb.db")
    finally:
        process.terminate()
        process.wait(30)
