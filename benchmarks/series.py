"""Run the whole series with the full-size model, all seven notebooks headless, and record what each notebook needed.

The run directory stays in the folder `--work`, so the same command resumes an interrupted run. `run.py` calls this."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
from run import REHEARSAL

RUNS = {"a large card": ["generation.cache_implementation=static"], "as on a T4": REHEARSAL}
# Profile article with fewer steps, questions, and tokens: enough for every notebook to do all of its work.
SETTINGS = {
    "dataset.num_rows": 80,
    "dataset.held_out_rows": 20,
    "training.max_steps": 20,
    "training.logging_steps": 1,
    "training.save_steps": 10,
    "training.eval_steps": 10,
    "generation.max_new_tokens": 128,
    "evaluation.num_questions": 15,
    "evaluation.mcq_limit": 4,
    "evaluation.mcq_max_new_tokens": 64,
    "export.check_rows": 4,
}
MEMORY = ("estimated", "in use", "reserved")
WHAT = (
    f"medcot run --profile article on the 8B model, seven notebooks headless: {SETTINGS['dataset.num_rows']} training rows, "
    f"{SETTINGS['dataset.held_out_rows']} held out, {SETTINGS['training.max_steps']} steps, "
    f"{SETTINGS['evaluation.num_questions']} questions with {SETTINGS['generation.max_new_tokens']} tokens each, "
    f"{SETTINGS['evaluation.mcq_limit']} multiple-choice questions"
)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run or resume one series, and return what its manifest says, whether the series is complete or not."""
    run_dir = options.work / name.replace(" ", "-")
    settings = [*RUNS[name], *options.set]
    pairs = [f"model.name={options.model}", f"dataset.path={options.rows}", *(f"{key}={SETTINGS[key]}" for key in SETTINGS)]
    sets = [word for pair in [*pairs, *settings] for word in ("--set", pair)]
    command = [sys.executable, "-m", "medcot_utils", "run", "--profile", "article", "--run-dir", str(run_dir), *sets]
    runner, samples = psutil.Popen(command), []
    while runner.poll() is None:
        samples.append((time.time(), own_memory_mb(runner)))
        time.sleep(0.25)
    print(f"{name}: exit {runner.returncode}", flush=True)
    if not (run_dir / "manifest.json").exists():
        sys.exit(runner.returncode)  # medcot refused to begin and has said why
    found = read_run(run_dir)
    for entry in found["steps"].values():
        if entry["seconds"]:
            end = entry["started"] + entry["seconds"]
            entry["own_memory_mb"] = max((mb for at, mb in samples if entry["started"] <= at <= end), default=None)
    return {"settings": settings, "exit": runner.returncode} | found


def own_memory_mb(runner: psutil.Process) -> int:
    """Return the RAM of the largest process that the runner has started, in MB, without the pages of files.

    The system drops a file's pages if another process needs the memory, so they count for nothing here."""
    sizes = [0]
    for process in runner.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            sizes.append(memory.rss - memory.shared)
    return round(max(sizes) / 1e6)


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return the run's record so far: {steps: {notebook: {state, seconds, estimate, cells, ...}}}.

    If notebook 05 is done, memory_gb and skipped_steps are added."""
    steps = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["steps"]
    keys = ("state", "started", "seconds", "estimate", "peak_memory_mb", "peak_gpu_memory_mb")
    found: dict[str, Any] = {"steps": {step: {key: entry.get(key) for key in keys} for step, entry in steps.items()}}
    for step, entry in found["steps"].items():
        if (executed := run_dir / "notebooks" / f"{step}.ipynb").exists():
            entry["cells"] = slow_cells(executed)
    if found["steps"].get("05_training", {}).get("state") == "done":
        log = [json.loads(line) for line in (run_dir / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
        found["memory_gb"] = training_memory_gb(run_dir / "notebooks" / "05_training.ipynb")
        found["skipped_steps"] = sum(entry.get("skipped_step", 0) for entry in log)
    return found


def slow_cells(executed: Path) -> dict[str, float]:
    """Return {number of the cell and its first line: seconds} of the code cells that took half a second or more."""
    found = {}
    for number, cell in enumerate(nbformat.read(executed, 4).cells):
        seconds = cell.metadata.get("papermill", {}).get("duration") or 0
        if cell.cell_type == "code" and seconds >= 0.5:
            found[f"{number} {cell.source.splitlines()[0]}"] = round(seconds, 1)
    return found


def training_memory_gb(executed: Path) -> dict[str, float]:
    """Return the GB {estimated, in use, reserved} of training alone, from the notebook's table 5.6.

    The manifest has only the memory of the whole notebook."""
    outputs = [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    shown = "\n".join(output["data"].get("text/plain", "") for output in outputs if "data" in output)
    found = {name: re.search(rf"^memory, .*\b{name} \(GB\) +([\d.]+)$", shown, re.MULTILINE) for name in MEMORY}
    return {name: float(match[1]) for name, match in found.items() if match}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(RUNS))
    parser.add_argument("--model", required=True, help="a folder or Hub id; benchmarks/make_random_8b.py makes one")
    parser.add_argument("--rows", required=True, help="a .jsonl file with Question, Complex_CoT, Response")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="a setting that overrides all of these")
    options = parser.parse_args()
    found = {"what": WHAT} | measure(options.name, options)
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
