"""Show which pins of a requirements file could move, with the reason that each line gives, and move them on request.

python .ci/pins.py FILE [--only NAME ...] [--write]

pip says what is newest for this Python. Whether the new versions work together, `make test` says."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.version import Version

PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;#]+)(?P<rest>.*)$")


def newest(name: str) -> str | None:
    """Return the newest release that pip finds for this Python; None if the index does not have the package."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", name]
    said = subprocess.run(pip, capture_output=True, text=True, check=False).stdout
    found = re.match(r"\S+ \((\S+)\)", said)
    return found[1] if found else None


def main(arguments: list[str] | None = None) -> None:
    """Print `name: old -> new` for each pin that could move; with --write, put the new versions into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="look at these pins only")
    parser.add_argument("--write", action="store_true", help="put the new versions into the file")
    options = parser.parse_args(arguments)
    lines = options.file.read_text(encoding="utf-8").splitlines()
    pins = {number: pin for number, line in enumerate(lines) if (pin := PIN.match(line))}
    if unknown := set(options.only or ()) - {pin["name"] for pin in pins.values()}:
        sys.exit(f"{options.file.name} pins no {', '.join(sorted(unknown))}: name packages as the file does")
    if options.only:
        pins = {number: pin for number, pin in pins.items() if pin["name"] in options.only}
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(newest, [pin["name"] for pin in pins.values()]))
    moved = 0
    for (number, pin), version in zip(pins.items(), versions, strict=True):
        if version is None:
            print(f"{pin['name']}: {pin['version']} -> not on the index")
        elif Version(version) > Version(pin["version"]):
            moved += 1
            print(f"{pin['name']}: {pin['version']} -> {version}  {pin['rest'].strip()}".rstrip())
            lines[number] = f"{pin['name']}=={version}{pin['rest']}"
    if moved and options.write:
        options.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    verb = "moved" if options.write else "could move"
    print(f"{options.file.name}: {moved} of {len(pins)} pins {verb}")


if __name__ == "__main__":
    main()
