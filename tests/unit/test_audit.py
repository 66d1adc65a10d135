"""`make audit`: advisories are listed with the reason that was given by hand, and silence is not taken for safety."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / ".ci" / "audit.py"
FAULTY = {"name": "thing", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"], "aliases": ["CVE-1"]}]}
SOUND = {"name": "steady", "version": "1.10", "vulns": []}
LEFT_OUT = {"name": "own", "skip_reason": "Dependency not found on PyPI"}
# It asks OSV's API as pip-audit does, if it is given one.
PIP_AUDIT = """#!{python}
import json, sys, urllib.request
packages, url = {packages}, sys.argv[sys.argv.index("--osv-url") + 1] if "--osv-url" in sys.argv else None
for package in packages if url else ():
    query = {{"package": {{"name": package["name"], "ecosystem": "PyPI"}}, "version": package["version"]}}
    with urllib.request.urlopen(url, json.dumps(query).encode()) as answer:
        found = json.load(answer).get("vulns", [])
    for one in found:
        [affected] = one["affected"]
        one["fix_versions"] = [event["fixed"] for range in affected["ranges"] for event in range["events"]]
    package["vulns"] = found
print(json.dumps({{"dependencies": packages}}))
"""


@pytest.fixture
def audit(tmp_path):
    """`audit(packages)`: (the process, .ci/advisories.md), with a pip-audit that answers so."""
    result = tmp_path / "advisories.md"

    def run(packages, *options):
        program = tmp_path / "pip-audit"
        program.write_text(PIP_AUDIT.format(python=sys.executable, packages=packages))
        program.chmod(0o755)
        command = [sys.executable, str(PROGRAM), str(program), "--result", str(result), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False), result

    return run


def test_an_advisory_fails_until_a_reason_stands_in_its_row(audit):
    done, result = audit([FAULTY, SOUND, LEFT_OUT])
    assert done.returncode == 1 and "move the pin, or write into advisories.md why it does not apply: PYSEC-1" in done.stderr
    text = result.read_text()
    assert "| thing 1.0 | PYSEC-1 | 1.1, 2.0 |  |" in text and "compared 2 packages" in text and "Not compared: own." in text
    result.write_text(text.replace("|  |", "| only its server, which is not used |"))
    done, _ = audit([FAULTY, SOUND])
    assert done.returncode == 0 and done.stdout == "advisories.md: 2 packages, 1 advisories\n", done.stderr
    assert "| 1.1, 2.0 | only its server, which is not used |" in result.read_text()


def test_a_pypi_out_of_reach_is_no_clean_result(audit):
    done, result = audit([LEFT_OUT])
    assert done.returncode == 1 and "PyPI's advisories cannot be reached from here" in done.stderr
    assert not result.exists()


def test_sections_below_the_table_are_kept_and_give_reasons(audit):
    section = "\n## Read by hand\n\nWhat was read.\n\n| thing 1.0 | CVE-1, GHSA-1 | 1.1 | not called |\n\n## More\n\nText.\n"
    result = audit([SOUND])[1]
    result.write_text(result.read_text() + section)
    for packages in ([FAULTY], [SOUND]):
        done, _ = audit(packages)
        assert done.returncode == 0 and result.read_text().endswith(section), done.stderr
        assert ("| PYSEC-1 | 1.1, 2.0 | not called |" in result.read_text()) is (packages == [FAULTY])


# --- a folder of advisories --------------------------------------------------------------------------------------------


def write(folder, name, package, affected, **more):
    entry = {"id": Path(name).stem, "modified": "2024-10-09T01:02:03Z", **more}
    entry["affected"] = [{"package": {"name": package, "ecosystem": "PyPI"}, **affected}]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(entry))


def within(*events):
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


@pytest.fixture
def advisories(tmp_path):
    folder = tmp_path / "advisories"
    below_1_10 = within({"introduced": "0"}, {"fixed": "1.10"})
    write(folder, "thing/PYSEC-1.yaml", "thing", below_1_10)
    write(folder, "thing/PYSEC-2.json", "thing", below_1_10, withdrawn="2024-10-10T00:00:00Z", modified="2024-10-11T00:00:00Z")
    write(folder, "PYSEC-3.json", "Listed_One", {"versions": ["2.0"]})
    write(folder, "PYSEC-4.json", "last", within({"introduced": "2"}, {"last_affected": "3.0"}))
    write(folder, "PYSEC-5.json", "odd", within({"introduced": "0"}, {"fixed": "the next"}))
    (folder / "workflow.yml").write_text("on: push\n")
    return folder


@pytest.mark.server
def test_a_folders_advisories_are_found_by_version(audit, advisories):
    versions = {
        "thing": ("1.9", "1.10", "1.10+cpu", "2.0"),
        "listed-one": ("2", "2.0.1"),
        "last": ("1.0", "2.5", "3.0+cpu", "3.0.1"),
        "odd": ("9",),  # a bound that is no version: someone has to look
    }
    packages = [{"name": name, "version": version} for name, several in versions.items() for version in several]
    done, result = audit(packages, "--advisories", str(advisories))
    rows = [row.split(" | ")[:3] for row in result.read_text().splitlines() if "PYSEC" in row]
    assert rows == [
        ["| last 2.5", "PYSEC-4", "none"],
        ["| last 3.0+cpu", "PYSEC-4", "none"],
        ["| listed-one 2", "PYSEC-3", "none"],
        ["| odd 9", "PYSEC-5", "none"],
        ["| thing 1.9", "PYSEC-1", "1.10"],
    ], done.stderr


@pytest.mark.server
def test_a_folders_age_is_said_beside_the_day(audit, advisories):
    done, result = audit([{"name": "steady", "version": "1.0"}], "--advisories", str(advisories))
    assert done.returncode == 0, done.stderr
    text = " ".join(result.read_text().split())
    assert f"compared 1 packages on {datetime.now(UTC):%Y-%m-%d}" in text
    assert "The newest advisory is of 2024-10-11, so what became known later is missing" in text


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [("notes.yaml", "on: push", "holds no advisories about Python packages"), ("bad.json", "{", "is neither YAML nor JSON")],
)
def test_a_folder_without_advisories_is_one_line(audit, tmp_path, file, text, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / file).write_text(text)
    done, result = audit([FAULTY], "--advisories", str(tmp_path / "folder"))
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert not result.exists()
