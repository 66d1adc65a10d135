"""Answer pip-audit's questions from a folder of advisories in OSV's format: a checkout of pypa/advisory-database, say."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

Advisories = dict[str, list[dict[str, Any]]]  # by package


def read(folder: Path) -> tuple[Advisories, str]:
    """Return the advisories about Python packages below `folder`, by package, and the newest day on which one changed.

    Withdrawn ones are left out. It exits with a line if a file cannot be read, or none holds an advisory."""
    by_package: Advisories = defaultdict(list)
    days = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".json")):
        text = file.read_bytes()
        try:  # the base loader takes 1.10 for a text, not for a number
            advisory = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=yaml.CBaseLoader)
        except (ValueError, yaml.YAMLError):
            sys.exit(f"{file} is neither YAML nor JSON: give a folder of advisories in OSV's format")
        if not isinstance(advisory, dict) or not {"id", "modified"} <= advisory.keys():
            continue  # a workflow of the checkout, say
        days += [advisory["modified"][:10], advisory.get("published", "")[:10]]
        for name in set() if advisory.get("withdrawn") else {_package(one) for one in advisory.get("affected", [])} - {None}:
            by_package[name].append(advisory)
    if not by_package:
        sys.exit(f"{folder} holds no advisories about Python packages: give a folder of files in OSV's format")
    return by_package, max(days)


def about(advisories: Advisories, name: str, version: str) -> list[dict[str, Any]]:
    """Return those about this version, as OSV's API would, each with the versions that fix it."""
    name, asked = canonicalize_name(name), Version(Version(version).public)  # 2.13.0+cpu is 2.13.0
    answer = []
    for advisory in advisories.get(name, []):
        affected = [one for one in advisory["affected"] if _package(one) == name and _affects(one, asked)]
        if affected:
            events = [event for one in affected for events in _ranges(one) for event in events]
            fixed = [event["fixed"] for event in events if _version(event.get("fixed", ""))]
            ranges = [{"type": "ECOSYSTEM", "events": [{"fixed": version} for version in fixed]}]
            package = {"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}
            answer.append({key: advisory[key] for key in ("id", "aliases") if key in advisory} | {"affected": [package]})
    return answer


@contextmanager
def served(advisories: Advisories) -> Iterator[str]:
    """Serve them on the loopback, and yield the URL."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = about(advisories, query["package"]["name"], query["version"])
            body = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing of each question."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def _package(affected: dict[str, Any]) -> str | None:
    package = affected.get("package", {})
    return canonicalize_name(package["name"]) if package.get("ecosystem") == "PyPI" else None


def _ranges(affected: dict[str, Any]) -> list[list[dict[str, str]]]:
    return [one["events"] for one in affected.get("ranges", []) if one["type"] == "ECOSYSTEM"]


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def _affects(affected: dict[str, Any], asked: Version) -> bool:
    return asked in map(_version, affected.get("versions", [])) or any(_within(events, asked) for events in _ranges(affected))


def _within(events: list[dict[str, str]], asked: Version) -> bool:
    """Return whether the last event up to `asked` leaves it affected; also if a bound cannot be read, so that someone looks."""
    bounds = [(_version(bound), kind) for event in events for kind, bound in event.items()]
    if not all(bound for bound, _ in bounds):
        return True
    inside = False
    for bound, kind in sorted(bounds):
        if kind == "introduced" and asked >= bound:
            inside = True
        elif (kind == "fixed" and asked >= bound) or (kind == "last_affected" and asked > bound):
            inside = False
    return inside
