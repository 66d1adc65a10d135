"""Compare the pins, and all that they bring, with advisories, and write the answer to .ci/advisories.md.

python .ci/audit.py PIP_AUDIT [--advisories FOLDER]

The advisories are PyPI's, or those in a folder, where PyPI cannot be reached. Why one does not apply is written into its row by
hand, and kept, as are the sections below the table. It fails while a row has no such reason."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import advisories as folders

ROOT = Path(__file__).resolve().parents[1]
PINS = [ROOT / f"requirements{kind}.txt" for kind in ("", "-nodeps", "-cpu", "-tests", "-tests-nodeps")]
PIN = re.compile(r"^[A-Za-z0-9._-]+==[^\s;#]+", re.MULTILINE)
ROW = re.compile(r"\| (?P<package>[^|]+) \| (?P<advisory>[^|]+) \| (?P<fixed>[^|]+) \| (?P<reason>[^|]*)\|")
TEXT = """# Advisories

`make audit` compared {count} packages on {day}: the pins of the GPU and the CPU stack, and everything that is installed with
the CPU stack. Not compared: {unknown}.
{source}

| package | advisory | fixed in | why it does not apply |
| --- | --- | --- | --- |
"""
PYPI = "The advisories are those that PyPI held on that day."
FOLDER = """The advisories are those in a folder. The newest advisory is of {newest}, so what became known later is missing, and
versions released after that day are hardly known."""


def audit(program: str, *what: str) -> list[dict[str, Any]]:
    """Return pip-audit's answer: packages with their version and advisories (`vulns`), or why they were left out."""
    command = [program, "--format", "json", "--progress-spinner", "off", "--skip-editable", *what]
    loopback = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} if "--osv-url" in what else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=loopback)
    if not done.stdout:
        sys.exit(f"pip-audit gave no answer: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return json.loads(done.stdout)["dependencies"]


def compare(program: str, *service: str) -> list[dict[str, Any]]:
    """Return what pip-audit says about everything that is installed, and about the pins of every file."""
    packages = audit(program, *service, "--path", sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory() as folder:
        for file in PINS:  # lines that pin nothing are among what is installed
            pins = Path(folder, file.name)
            pins.write_text("\n".join(PIN.findall(file.read_text(encoding="utf-8"))), encoding="utf-8")
            packages += audit(program, *service, "--no-deps", "--disable-pip", "-r", str(pins))
    return packages


def find_reason(advisory: dict[str, Any], reasons: dict[str, str]) -> str:
    """Return the reason that was written under any of an advisory's names; empty if there is none."""
    names = [advisory["id"], *advisory.get("aliases", [])]
    return next((reasons[name] for name in names if reasons.get(name)), "")


def main(arguments: list[str] | None = None) -> None:
    """Write the table, and exit with a line on what has no reason, or if PyPI's advisories cannot be reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="pip-audit")
    parser.add_argument("--advisories", type=Path, metavar="FOLDER", help="advisories in OSV's format, instead of PyPI's")
    parser.add_argument("--result", type=Path, default=ROOT / ".ci" / "advisories.md")
    options = parser.parse_args(arguments)
    result, source, service = options.result, PYPI, []
    with ExitStack() as stack:
        if options.advisories:
            held, newest = folders.read(options.advisories)
            source = FOLDER.format(newest=newest)
            service = ["--vulnerability-service", "osv", "--osv-url", stack.enter_context(folders.served(held))]
        packages = compare(options.program, *service)
    known = {(package["name"], package["version"]): package["vulns"] for package in packages if "vulns" in package}
    if not known:
        sys.exit("PyPI's advisories cannot be reached from here: nothing was compared, and nothing is written")
    unknown = sorted({package["name"] for package in packages if "vulns" not in package})
    before = result.read_text(encoding="utf-8") if result.exists() else ""
    reasons = {name: row["reason"].strip() for row in ROW.finditer(before) for name in row["advisory"].split(", ")}
    found = [
        (f"{name} {version}", advisory["id"], ", ".join(advisory["fix_versions"]) or "none", find_reason(advisory, reasons))
        for (name, version), advisories in sorted(known.items())
        for advisory in advisories
    ]
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    text = TEXT.format(count=len(known), day=day, source=source, unknown=", ".join(unknown) or "none of them")
    rows = [f"| {' | '.join(row)} |\n" for row in found]
    _, heading, sections = before.partition("\n## ")
    result.write_text(text + "".join(rows) + heading + sections, encoding="utf-8")
    print(f"{result.name}: {len(known)} packages, {len(found)} advisories")
    if without := [advisory for _, advisory, _, reason in found if not reason]:
        sys.exit(f"move the pin, or write into {result.name} why it does not apply: {', '.join(without)}")


if __name__ == "__main__":
    main()
