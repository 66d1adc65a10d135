"""Compare the pins, and all that they bring, with the advisories that PyPI holds, and write the answer to .ci/advisories.md.

python .ci/audit.py PIP_AUDIT

Why an advisory does not apply is written into its row by hand, and kept. It fails while a row has no such reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS = [ROOT / f"requirements{kind}.txt" for kind in ("", "-nodeps", "-cpu", "-tests", "-tests-nodeps")]
PIN = re.compile(r"^[A-Za-z0-9._-]+==[^\s;#]+", re.MULTILINE)
ROW = re.compile(r"\| (?P<package>[^|]+) \| (?P<advisory>[^|]+) \| (?P<fixed>[^|]+) \| (?P<reason>[^|]*)\|")
TEXT = """# Advisories

`make audit` compared {count} packages with the advisories that PyPI held on {day}: the pins of the GPU and the CPU stack,
and everything that is installed with the CPU stack. PyPI does not know: {unknown}.

| package | advisory | fixed in | why it does not apply |
| --- | --- | --- | --- |
"""


def audit(program: str, *what: str) -> list[dict[str, Any]]:
    """Return pip-audit's answer: packages with their version and advisories (`vulns`), or why they were left out."""
    command = [program, "--format", "json", "--progress-spinner", "off", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(f"pip-audit gave no answer: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return json.loads(done.stdout)["dependencies"]


def main(program: str, result: Path = ROOT / ".ci" / "advisories.md") -> None:
    """Write the table, and exit with a line on what has no reason, or if PyPI's advisories cannot be reached."""
    packages = audit(program, "--path", sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory() as folder:
        for file in PINS:  # lines that pin nothing are among what is installed
            pins = Path(folder, file.name)
            pins.write_text("\n".join(PIN.findall(file.read_text(encoding="utf-8"))), encoding="utf-8")
            packages += audit(program, "--no-deps", "--disable-pip", "-r", str(pins))
    known = {(package["name"], package["version"]): package["vulns"] for package in packages if "vulns" in package}
    if not known:
        sys.exit("PyPI's advisories cannot be reached from here: nothing was compared, and nothing is written")
    unknown = sorted({package["name"] for package in packages if "vulns" not in package})
    before = result.read_text(encoding="utf-8") if result.exists() else ""
    reasons = {row["advisory"]: row["reason"].strip() for row in ROW.finditer(before)}
    found = [
        (f"{name} {version}", advisory["id"], ", ".join(advisory["fix_versions"]) or "none")
        for (name, version), advisories in sorted(known.items())
        for advisory in advisories
    ]
    text = TEXT.format(count=len(known), day=f"{datetime.now(UTC):%Y-%m-%d}", unknown=", ".join(unknown) or "none of them")
    rows = [f"| {' | '.join([*one, reasons.get(one[1], '')])} |\n" for one in found]
    result.write_text(text + "".join(rows), encoding="utf-8")
    print(f"{result.name}: {len(known)} packages, {len(found)} advisories")
    if without := [advisory for _, advisory, _ in found if not reasons.get(advisory)]:
        sys.exit(f"move the pin, or write into {result.name} why it does not apply: {', '.join(without)}")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
