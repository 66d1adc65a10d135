"""Resolve the pins over the packages that Colab and Kaggle hold, as the setup cell would install them there.

python .ci/platforms.py [--plain FILE] [--home FOLDER] [--freeze FILE]

Nothing is installed: pip's own resolver runs over an environment of metadata alone, of this Python. It fails if the pins do not
resolve there, or if a package that a running session stands on would be replaced. With --plain it shows, to compare, what
`pip install -r FILE` would replace, and fails for nothing.

Colab's packages are its own list (tests/data/README.md). Kaggle publishes none: its image is built on Colab's, so the list here
is Colab's with what public sessions of Kaggle show."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FREEZE = ROOT / "tests" / "data" / "colab-freeze-2026-08.txt"
# What the sessions of these platforms must keep, by name: the running kernel, and what their CUDA and TensorFlow need.
KERNEL = ("ipykernel", "ipython", "jupyter-client", "jupyter-core", "nbclient", "pyzmq", "tornado", "traitlets")
KEPT = (*KERNEL, "torch", "torchvision", "torchaudio", "torchcodec", "triton", "protobuf")
# Their metadata is not on the index, since they are builds of PyTorch's own: each fits one torch.
FIT = {"torchvision": "torch=={torch}", "torchaudio": "torch=={torch}"}

CU128_2_11 = {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "torchaudio": "2.11.0+cu128", "torchcodec": "0.11.0+cu128"}
CU128_2_10 = {"torch": "2.10.0+cu128", "torchvision": "0.25.0+cu128", "torchaudio": "2.10.0+cu128", "torchcodec": "0.10.0+cu128"}
CPU_2_11 = {name: version.replace("cu128", "cpu") for name, version in CU128_2_11.items()}
SESSIONS = {  # {what it is: (whether it has a GPU, what differs from Colab's list)}
    "Colab (its list of August 2026); Kaggle's T4 x2 of October as far as known (torch 2.11.0+cu128 on Colab's list)": (
        True,
        CU128_2_11,
    ),
    "Kaggle's T4 x2 of June to September as far as known (torch 2.10.0+cu128 on Colab's list)": (True, CU128_2_10),
    "Colab without a GPU (torch 2.11.0+cpu on its list)": (False, CPU_2_11),
}


class ResolveError(Exception):
    """pip found no way; the message is its reason."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_freeze(path: Path) -> dict[str, str]:
    """Return {package: version} of a list of `name==version` lines."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def resolve(python: str, lines: list[str], constraints: dict[str, str], *options: str) -> list[dict[str, Any]]:
    """Return the metadata of what pip would install for `python`. Raises ResolveError."""
    with tempfile.TemporaryDirectory() as folder:
        report, file = Path(folder, "report.json"), Path(folder, "constraints.txt")
        file.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--dry-run", *options]
        pip += ["--progress-bar", "off", "--report", str(report), "--constraint", str(file), *lines]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            conflict = done.stdout.partition("The conflict is caused by:")[2].partition("\n\n")[0]
            raise ResolveError(conflict.strip() or done.stderr.strip())
        return [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


def kernel_metadata(freeze: dict[str, str]) -> dict[str, list[str]]:
    """Return {package: what it needs} of the kernel's packages in these versions, as the index states it."""
    public = {name: version for name, version in freeze.items() if "+" not in version}
    lines = [f"{name}=={freeze[name]}" for name in KERNEL if name in freeze]
    found = resolve(sys.executable, lines, public, "--ignore-installed")
    return {canonical(one["name"]): one.get("requires_dist", []) for one in found}


def make_environment(folder: Path, packages: dict[str, str], needs: dict[str, list[str]]) -> str:
    """Make an environment that holds the packages' metadata and nothing else, and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for name, version in packages.items():
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        fit = [FIT[name].format(**packages)] if name in FIT else []
        lines += [f"Requires-Dist: {need}" for need in [*needs.get(name, []), *fit]]
        place = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "bin" / "python")


def plan(python: str, home: Path, gpu: bool) -> dict[str, Any]:
    """Return the plan that the setup cell makes in such a session."""
    code = "import dataclasses, json, pathlib, sys; from medcot_utils.machine import installing; "
    code += f"plan = installing.plan_install(pathlib.Path(sys.argv[1]), gpu={gpu}); print(json.dumps(dataclasses.asdict(plan)))"
    command = [python, "-c", code, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout)


def look(
    title: str, packages: dict[str, str], needs: dict[str, list[str]], home: Path, gpu: bool, plain: str | None
) -> list[str]:
    """Print what a session's packages become. Return what is wrong with that."""
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder, "session"), packages, needs)
        try:
            if plain:
                installed, alone = resolve(python, ["-r", plain], {}), []
            else:
                made = plan(python, home, gpu)
                installed, alone = resolve(python, made["whole"], made["kept"]), made["alone"]
        except ResolveError as error:
            return [f"{title}: the pins do not resolve: {' '.join(str(error).split())}"]
    after = {canonical(one["name"]): one["version"] for one in installed}
    after |= {canonical(line.partition("==")[0]): line.partition("==")[2] for line in alone}
    replaced = {name: version for name, version in after.items() if packages.get(name, version) != version}
    new = sorted(set(after) - set(packages))
    print(
        f"\n{title}\n  {len(replaced)} replaced: " + ", ".join(f"{n} {packages[n]} -> {v}" for n, v in sorted(replaced.items()))
    )
    print(f"  {len(new)} new: {', '.join(f'{name} {after[name]}' for name in new)}")
    lost = sorted(set(replaced) & {*KEPT, *needs})
    print(f"  of the running session: {', '.join(lost) or 'none'}")
    return [f"{title}: {name} {packages[name]} would become {after[name]}" for name in lost]


def main() -> None:
    """Resolve for every session, and exit with what is wrong, if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", metavar="FILE", help="resolve this requirements file as it stands, to compare")
    parser.add_argument("--home", type=Path, default=ROOT, help="the folder of the requirements files")
    parser.add_argument("--freeze", type=Path, default=FREEZE, help="name==version lines of what a session holds")
    options = parser.parse_args()
    freeze = read_freeze(options.freeze)
    try:
        needs = kernel_metadata(freeze)
    except ResolveError as error:
        sys.exit(f"the kernel's packages of {options.freeze.name} are not on the index: {error}")
    kernel = ", ".join(f"{name} {freeze[name]}" for name in sorted(needs) if name in freeze)
    print(f"Python {sys.version.split()[0]}; the kernel's packages: {kernel}")
    wrong = []
    for title, (gpu, differing) in SESSIONS.items():
        held = freeze | {name: version for name, version in differing.items() if name in freeze}
        wrong += look(title, held, needs, options.home, gpu, options.plain)
    if wrong and not options.plain:
        sys.exit("\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
