"""Run the demo in several environments, and find which of its verdicts depend on the machine.

    python benchmarks/machines.py --out benchmarks/results/demo-machines.json [--name "this machine"]
        [--only "as is, 1 thread" ...]

Greedy answers follow the likeliest token, and rounding decides between two tokens that are nearly equally likely. So another
number of threads, or another processor, writes different texts and trains a different adapter. The thresholds of the verdicts are
those of the package, the same everywhere. A later call adds to the file. The README and docs/results.md mark verdicts that
differ."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medcot_utils.run.directory import Run
from medcot_utils.series import results

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ENVIRONMENTS = {
    "as is, 2 threads": {"OMP_NUM_THREADS": "2"},
    "as is, 1 thread": {"OMP_NUM_THREADS": "1"},
    "AVX2 only, 2 threads": {"OMP_NUM_THREADS": "2", **AVX2},
    "AVX2 only, 1 thread": {"OMP_NUM_THREADS": "1", **AVX2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="this machine", help="name of the machine in the file")
    parser.add_argument("--only", nargs="+", choices=[*ENVIRONMENTS], default=[*ENVIRONMENTS])
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--runs", type=Path, help="folder of the run directories; if not given, a temporary folder")
    parser.add_argument("--commit", help="the commit of the code, if this is not a git checkout")
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp())
    with ThreadPoolExecutor(options.at_once) as pool:
        for name, found in zip(options.only, pool.map(lambda name: run_in(name, folder, options), options.only), strict=True):
            machines = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else empty()
            machines["environments"][f"{options.name}, {name}"] = found
            options.out.write_text(json.dumps(machines, indent=1) + "\n", encoding="utf-8")
    differing = results.differing(machines)
    print(f"{len(machines['environments'])} environments, {len(differing)} verdicts differ between them:")
    for key in sorted(differing):
        print(f"  {key}: {', '.join(sorted({str(one['verdicts'].get(key)) for one in machines['environments'].values()}))}")


def empty() -> results.Machines:
    return {"what": "the demo's verdicts in several environments (benchmarks/machines.py)", "environments": {}}


def run_in(name: str, folder: Path, options: argparse.Namespace) -> results.Environment:
    """Run the series in one environment, and return its verdicts and machine. Raises CalledProcessError if the run fails."""
    run_dir = folder / name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "-m", "medcot_utils", "run", "--profile", options.profile, "--run-dir", str(run_dir)]
    with (folder / f"{run_dir.name}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, env=os.environ | ENVIRONMENTS[name], stdout=log, stderr=subprocess.STDOUT, check=True)
    demo = results.collect(Run.open(run_dir), options.commit)
    return {
        "commit": demo["commit"],
        "machine": demo["machine"],
        "verdicts": results.verdicts_of(demo["metrics"], demo["merged"]),
    }


if __name__ == "__main__":
    main()
