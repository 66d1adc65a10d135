"""Write the numbers in the README and docs/results.md from docs/demo.json, which holds those of a run of the demo.

Each part between `<!-- demo: NAME -->` and `<!-- end -->` is written. A number that somebody changes there is a fault."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from medcot_utils.errors import MedcotError
from medcot_utils.evaluation.comparison import verdict
from medcot_utils.evaluation.merged_column import read_merged
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.files import to_json, write_atomic

if TYPE_CHECKING:
    from medcot_utils.evaluation.measured import Measured
    from medcot_utils.evaluation.merged import MergedMeasured
    from medcot_utils.run.directory import Run

DEMO = HOME / "docs" / "demo.json"
MACHINES = HOME / "benchmarks" / "results" / "demo-machines.json"
FIGURE = HOME / "docs" / "comparison.png"
DOCUMENTS = (HOME / "README.md", HOME / "docs" / "results.md")
_PART = re.compile(r"(?P<begin><!-- demo: (?P<name>[a-z-]+) -->\n)(?P<text>.*?)(?P<end>\n?<!-- end -->)", re.DOTALL)


class ResultsError(MedcotError):
    """Say why the documents cannot be written from a run."""


class DemoMachine(TypedDict):
    """Hold the kind of machine on which the demo ran, without its name."""

    processor: str  # architecture and instruction sets, from `hardware.describe_processor`
    cores: int


class DemoSettings(TypedDict):
    """Hold the settings that the sentences mention."""

    max_new_tokens: int
    answer_tokens: int | None
    confidence_level: float
    merge_into: str


class Demo(TypedDict):
    """Hold the content of docs/demo.json: the numbers of one run of the demo, and what made them.

    seconds: {notebook: its time}. peak_memory_mb: that of the notebook with the highest peak. merged: None if the merged model
    was not measured."""

    commit: str
    machine: DemoMachine
    seconds: dict[str, float]
    peak_memory_mb: int
    settings: DemoSettings
    plan: dict[str, int]  # rows, steps, effective_batch
    metrics: Measured
    merged: MergedMeasured | None


class Environment(TypedDict):
    """Hold the verdicts of one run of the demo (`verdicts_of`), and its machine."""

    commit: str
    machine: DemoMachine
    verdicts: dict[str, str]


class Machines(TypedDict):
    """Hold the content of benchmarks/results/demo-machines.json: the demo's verdicts in several environments.

    environments: {name: its verdicts}, with names such as `an EPYC with AVX2, 1 thread`."""

    what: str
    environments: dict[str, Environment]


# --- collect -----------------------------------------------------------------------------------------------------------


def collect(run: Run, commit: str | None = None) -> Demo:
    """Return a finished run's numbers, with the commit that made them; by default, the commit of the checkout.

    Raises RunError if an artifact that it reads is missing, and ResultsError if the commit is unknown."""
    config, machine, steps = run.config, run.read("machine"), run.manifest()["steps"]
    plan = run.read("plan")
    return {
        "commit": commit or _commit(),
        "machine": {"processor": machine.get("processor", machine["system"]), "cores": machine["cpu_cores"]},
        "seconds": {name: round(steps[name]["seconds"], 1) for name in STEPS},
        "peak_memory_mb": max(steps[name]["peak_memory_mb"] or 0 for name in STEPS),
        "settings": {
            "max_new_tokens": config.generation.max_new_tokens,
            "answer_tokens": config.evaluation.answer_tokens,
            "confidence_level": config.evaluation.confidence_level,
            "merge_into": config.export.merge_into,
        },
        "plan": {name: plan[name] for name in ("rows", "steps", "effective_batch")},
        "metrics": run.read("metrics"),
        "merged": read_merged(run),
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(HOME), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ResultsError(f"the commit that made the numbers is unknown: {done.stderr.strip()}; run this in a git checkout")
    return done.stdout.strip()


def verdicts_of(metrics: Measured, merged: MergedMeasured | None) -> dict[str, str]:
    """Return {subject: verdict} for every verdict of a run, without numbers. All machines should give the same verdicts.

    The subjects are `as they answer/METRIC`, `forced closing/METRIC`, `claim/CLAIM`, `multiple choice/TASK/READING`, and
    `merged model/METRIC`."""
    found = {}
    for reading, compared in (("as they answer", metrics["metrics"]), ("forced closing", metrics.get("forced", {}))):
        found |= {f"{reading}/{name}": verdict(name, metric) for name, metric in compared.items()}
    found |= {f"claim/{claim['claim']}": claim["verdict"] for claim in metrics["claims"]}
    for one in metrics.get("mcq_readings", []):
        found[f"multiple choice/{one['task']}/{one['reading']}"] = verdict("mcq_accuracy", one)
    if merged:
        found |= {f"merged model/{one['metric']}": one["verdict"] for one in merged["verdicts"]}
    return {key: in_short(text) for key, text in found.items()}


def in_short(text: str) -> str:
    """Return a verdict without its reason and numbers, as in `holds`, `rose`, or `no difference shown`."""
    return re.split(r"[:,]| with ", text, maxsplit=1)[0]


def differing(machines: Machines | None) -> set[str]:
    """Return the subjects (keys of `verdicts_of`) whose verdicts differ between environments."""
    found = [one["verdicts"] for one in machines["environments"].values()] if machines else []
    return {key for verdicts in found for key in verdicts if len({one.get(key) for one in found}) > 1}


# --- write -------------------------------------------------------------------------------------------------------------


def read_demo() -> Demo:
    """Return the committed numbers. Raises ResultsError if docs/demo.json is missing."""
    if not DEMO.exists():
        raise ResultsError("docs/demo.json is missing: make notebooks writes it")
    demo: Demo = json.loads(DEMO.read_text(encoding="utf-8"))
    return demo


def read_parts() -> dict[str, str]:
    """Return {name: text} of every part, from the committed numbers. Raises ResultsError if docs/demo.json is missing."""
    from medcot_utils.series.results_text import write_parts

    demo = read_demo()
    machines: Machines | None = json.loads(MACHINES.read_text(encoding="utf-8")) if MACHINES.exists() else None
    return write_parts(demo, differing(machines))


def fill_parts(text: str, parts: Mapping[str, str]) -> str:
    """Return a document with every part rewritten. Raises ResultsError if it names an unknown part."""
    if unknown := [match["name"] for match in _PART.finditer(text) if match["name"] not in parts]:
        raise ResultsError(f"unknown part {unknown[0]}: expected one of {', '.join(parts)}")
    return _PART.sub(lambda match: f"{match['begin']}{parts[match['name']]}\n<!-- end -->", text)


def faults() -> list[str]:
    """Return one line for each document or figure that differs from docs/demo.json, and for each part that no document has."""
    parts = read_parts()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    named = {match["name"] for text in texts.values() for match in _PART.finditer(text)}
    changed = [path.name for path, text in texts.items() if fill_parts(text, parts) != text]
    found = [f"{name} does not say what docs/demo.json holds: make results writes it" for name in changed]
    found += [f"no document has the part {name}" for name in parts if name not in named]
    drawn = _drawn_from(FIGURE) == _digest(read_demo())
    return found if drawn else [*found, f"{FIGURE.name} was not drawn from docs/demo.json: make results draws it"]


def _digest(demo: Demo) -> str:
    """Return the sha256 of the numbers that the figure shows."""
    return hashlib.sha256(to_json([demo["metrics"], demo["merged"]]).encode()).hexdigest()


def _drawn_from(figure: Path) -> str | None:
    """Return the digest that a figure holds of the numbers it was drawn from; None if there is no figure or no digest."""
    from PIL import Image

    if not figure.exists():
        return None
    with Image.open(figure) as picture:
        return picture.info.get("Description")


def write_documents() -> list[Path]:
    """Write every part of the documents and draw the figure from docs/demo.json. Return the files that changed."""
    from medcot_utils.plots import comparison_figure

    parts, demo, changed = read_parts(), read_demo(), []
    if _drawn_from(FIGURE) != _digest(demo):
        said = {"Software": None, "Description": _digest(demo)}
        comparison_figure(demo["metrics"], demo["merged"]).savefig(FIGURE, metadata=said)
        changed.append(FIGURE)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if (filled := fill_parts(text, parts)) != text:
            write_atomic(path, filled)
            changed.append(path)
    return changed


def write_results(run: Run) -> list[Path]:
    """Write docs/demo.json from a finished run of the demo, then the documents and the figure. Return the files that changed."""
    write_atomic(DEMO, to_json(collect(run)))
    return [DEMO, *write_documents()]
