"""Run the seven notebooks on a tiny random checkpoint of each model family, offline, and write the table of docs/models.md.

    make families

Two families run at a time, each on one thread. A family that fails does not stop the others: the table says where it stopped, and
the command ends with 1. With families named, or settings changed, no table is written."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from tiny_families import FAMILIES  # noqa: E402

from medcot_utils.config import load_config  # noqa: E402
from medcot_utils.errors import MedcotError  # noqa: E402
from medcot_utils.run.artifacts import STEPS  # noqa: E402
from medcot_utils.run.directory import Run  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by make families: begin -->\n", "<!-- made by make families: end -->\n"
# As little as each notebook can do: what a family changes shows in the first step, question and token.
SMALLEST = (
    "dataset.num_rows=8",
    "dataset.held_out_rows=6",
    "training.max_steps=2",
    "training.save_steps=2",
    "training.eval_steps=null",
    "generation.max_new_tokens=8",
    "evaluation.num_questions=6",
    "evaluation.n_samples=0",
    "evaluation.n_resamples=200",
    "evaluation.mcq_limit=2",
    "evaluation.mcq_max_new_tokens=8",
    "export.check_new_tokens=4",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    steps: dict[str, str]  # {notebook: yes, or no}
    failure: str | None  # the line that `medcot run` ended with


def run_family(name: str, folder: Path, more: list[str]) -> Outcome:
    """Run the series on one family's checkpoint in the folder, and return what became of it."""
    checkpoint, run_dir = folder / name / "model", folder / name / "run"
    settings = [f"model.name={json.dumps(str(checkpoint))}", *SMALLEST, *FAMILIES[name].settings, *more]
    chosen = [argument for setting in settings for argument in ("--set", setting)]
    command = [sys.executable, "-m", "medcot_utils", "run", "--profile", "smoke", "--run-dir", str(run_dir), *chosen]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search, "COLUMNS": "200"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    failure = None if done.returncode == 0 else (done.stderr or done.stdout).strip().splitlines()[-1]
    print(f"{FAMILIES[name].title}: {failure or 'all seven notebooks'} ({time.monotonic() - began:.0f} s)", flush=True)
    states = dict.fromkeys(STEPS, "no")
    if (run_dir / "config.json").exists():
        run = Run.open(run_dir)
        states = {step: "yes" if run.step_state(step) == "done" else "no" for step in STEPS}
    return Outcome(states, failure and failure.replace(str(checkpoint), "model"))


def find_refused(checkpoint: Path) -> list[str]:
    """Return the lines that a family's checkpoint meets with the default target modules, and with a GGUF asked for."""
    from transformers import AutoModelForCausalLM

    from medcot_utils.export.gguf import check_gguf
    from medcot_utils.models.targets import check_targets

    config = load_config("smoke", [f"model.name={json.dumps(str(checkpoint))}", "export.gguf=f16"])
    checks: dict[str, Callable[[], object]] = {
        "04, without the setting": lambda: check_targets(AutoModelForCausalLM.from_pretrained(checkpoint), config.lora),
        "01, with `export.gguf`": lambda: check_gguf(config),
    }
    lines = []
    for when, check in checks.items():
        try:
            check()
        except MedcotError as error:
            lines.append(f"{when}: {str(error).replace(str(checkpoint), 'it')}")
    return lines


def format_table(outcomes: dict[str, Outcome], refused: dict[str, list[str]]) -> str:
    """Return the families' table in Markdown, and below it what is refused or failed, one line each."""
    titles = ["family", "as in", *(step[:2] for step in STEPS), "settings it needs"]
    rows = [titles, ["---"] * len(titles)]
    notes = []
    for name, outcome in outcomes.items():
        family = FAMILIES[name]
        needed = ", ".join(f"`{setting}`" for setting in family.settings) or "none"
        rows.append([family.title, family.stands_for, *outcome.steps.values(), needed])
        notes += [f"- {family.title}, {line}" for line in refused[name]]
        notes += [f"- {family.title} failed: {outcome.failure}"] if outcome.failure else []
    return "\n".join(
        [*(f"| {' | '.join(row)} |" for row in rows), "", "These are refused, with the message that you see:", "", *notes, ""]
    )


def main() -> int:
    """Run the families named on the command line, or all; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; none named: all of them")
    parser.add_argument("--at-once", type=int, default=2, help="families that run side by side")
    parser.add_argument("--keep", type=Path, help="a folder that keeps checkpoints and runs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a further setting of each run")
    asked = parser.parse_args()
    names = asked.families or list(FAMILIES)
    if unknown := set(names) - set(FAMILIES):
        parser.error(f"unknown family {', '.join(unknown)}: expected {', '.join(FAMILIES)}")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(asked.at_once) as pool:
        folder = (asked.keep or Path(temporary)).absolute()
        for name in names:
            FAMILIES[name].make(folder / name / "model")
        refused = {name: find_refused(folder / name / "model") for name in names}
        outcomes = dict(zip(names, pool.map(lambda name: run_family(name, folder, asked.set), names), strict=True))
    if names == list(FAMILIES) and not asked.set:
        text, made = DOCUMENT.read_text(encoding="utf-8"), format_table(outcomes, refused)
        DOCUMENT.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + made + END, text, flags=re.DOTALL), encoding="utf-8")
        print(f"the table stands in {DOCUMENT.relative_to(ROOT)}")
    return int(any(outcome.failure for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
