"""Texts of others that try to be more than text, and a made-up run that has one of them in every field."""

from __future__ import annotations

import json
import re
from typing import Any

from made_up_runs import MORE, fill_more

from medcot_utils.config import RunConfig
from medcot_utils.evaluation.grades import read_pairs
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run

# {what it tries: (the text, what a reader should see)}. Whatever runs in a page sets its title.
RAN = "document.title='ran'"
PAYLOADS = {
    "typed": ("BP <90 & >60, \"so\" 'said'", None),
    "script": (f"<script>{RAN}</script>", None),
    "closing": (f"</textarea></title></style></script></pre></td><script>{RAN}</script>", None),
    "attribute": (f'" onmouseover="{RAN}" \' autofocus onfocus={RAN} x="', None),
    "picture": (f'<img src=nowhere onerror="{RAN}"><svg onload={RAN}><iframe srcdoc="x"></iframe>', None),
    "link": (f"[here](javascript:{RAN}) ![x](nowhere.png) <a href=javascript:{RAN}>y</a>", None),
    "Markdown": ("**b** _i_ `c` ~~s~~ | a | b | :smile: &amp; &#60; <!-- c -->", None),
    "formula": (r"$5 or $6, \(x\) \[y\] $$\frac{z$$ {{ 7*7 }} ${1+1}", None),
    "rich": ("[red]r[/red] [link=https://evil.example]l[/link] [/] :smile:", None),
    "terminal": (
        "\x1b[2J\x1b[31mr\x1b[0m\x1b]0;t\x07 a\b\x7f",
        r"\x1b[2J\x1b[31mr\x1b[0m\x1b]0;t\x07 a\x08\x7f",
    ),
    "C1": ("\x9b31mr\x9d0;t\x9c \x90q\x9c", r"\x9b31mr\x9d0;t\x9c \x90q\x9c"),
    "direction": ("\u202eevil\u202c \u2066a\u2067b\u2069 \u202dc", r"\u202eevil\u202c \u2066a\u2067b\u2069 \u202dc"),
}
# What stands for something: a model, a reading, a key into another table.
_WORDS = {"behaves", "model", "closed_by", "reading", "metric", "merge_into"}


def mark(name: str) -> str:
    """A payload between marks by which it is found."""
    return f"«{PAYLOADS[name][0]}»"


def shown(name: str) -> str:
    """What stands between the marks where it is shown."""
    text, seen = PAYLOADS[name]
    return seen or text


def found_in(text: str) -> list[str]:
    """What stands between marks in a text, with a space for each run of white space: a page or a terminal wraps."""
    return [" ".join(one.split()) for one in re.findall("«(.*?)»", text, re.DOTALL)]


def plant(value: Any, planted: str, key: str = "") -> Any:
    """The value with `planted` at the end of every text in it. Equal texts stay equal, and begin as they did."""
    if isinstance(value, dict):
        return {name: plant(one, planted, name) for name, one in value.items()}
    if isinstance(value, list):
        return [plant(one, planted, key) for one in value]
    if key == "completion" and isinstance(value, str):  # the page shows its parts
        value = value.replace("\n</think>", f"{planted}\n</think>")
    # A single letter is an option.
    return value + planted if isinstance(value, str) and key not in _WORDS and len(value) > 1 else value


def plant_config(config: RunConfig, planted: str) -> RunConfig:
    """The settings with `planted` wherever any text will do."""
    free = {
        "model": ("name", "revision", "quantized_name", "quantized_revision"),
        "dataset": ("name", "subset", "revision"),
        "training": ("optim", "lr_scheduler_type"),
        "tracking": ("project", "job_type", "entity"),
    }
    changes = {
        section: getattr(config, section).model_copy(
            update={name: f"{getattr(getattr(config, section), name) or ''}{planted}" for name in names}
        )
        for section, names in free.items()
    }
    changes["model"] = changes["model"].model_copy(update={"name": f"me/model{planted}"})
    changes["dataset"] = changes["dataset"].model_copy(
        update={"path": f"rows{planted}.jsonl", "columns": config.dataset.columns.model_copy(update={"question": planted})}
    )
    changes["lora"] = config.lora.model_copy(update={"target_modules": (f"q_proj{planted}",)})
    changes["evaluation"] = config.evaluation.model_copy(update={"mcq_tasks": (f"shipped{planted}",)})
    return config.model_copy(update=changes)


def planted_run(path: Any, name: str) -> Run:
    """A run up to the export check with a payload in every text of its artifacts, its settings, its manifest and its records."""
    planted = mark(name)
    config = plant_config(MORE, planted)
    fill_more(Run.create(path, config))
    named = config.evaluation.model_copy(update={"embedding_model": f"me/embeds{planted}"})  # which `fill_more` would load
    run = Run.create(path, config.model_copy(update={"evaluation": named}))
    made = run.manifest()["artifacts"]
    for artifact in ARTIFACTS:  # in their order, so that each is fresh
        if artifact in made and ARTIFACTS[artifact].file.endswith((".json", ".jsonl")):
            value = plant(_more_texts(artifact, run.read(artifact)), planted)
            run.write(artifact, _join_pairs(value, planted) if artifact == "export_check" else value)
        elif artifact == "report":
            run.write(artifact, "no report yet")
        elif artifact in ("train_rows", "held_out_rows"):
            run.write(artifact, run.read(artifact))
        elif artifact in ("adapter", "merged"):
            run.write(artifact, lambda folder: (folder / "model.safetensors").write_bytes(b"0"))
    manifest = run.manifest()
    manifest["steps"] = {
        "01_setup": {"state": "failed", "error": f"ValueError: {planted}", "host": planted},
        "02_baseline_inference": {"state": f"paused {planted}", "error": planted},
        "06_comparison": {"state": "done", "seconds": 1.0, "peak_memory_mb": 1, "error": planted},
    }
    for entry in manifest["artifacts"].values():
        entry["settings"] = plant(entry["settings"], planted)
    run._save(manifest)
    pair = read_pairs(run)[0]
    judged = {"verdict": "tie", "note": planted, "shown_as_a": "base", "answers": pair.digest, "at": "2026-01-01T00:00:00Z"}
    grade = judged | {"id": pair.id, "grader": f"Dr. {planted}"}
    (run.path / "grades.jsonl").write_text(json.dumps(grade) + "\n", encoding="utf-8")
    tracked = {"backend": "trackio", "project": planted, "fingerprint": planted, "id": planted, "name": planted}
    (run.path / "tracking.json").write_text(json.dumps(tracked | {"url": f"https://x/{planted}", "folder": planted}))
    return run


def _join_pairs(check: Any, planted: str) -> Any:
    """The export check whose losses go by the names of its pairs again."""
    losses = {key if key == "merged" else key + planted: loss for key, loss in check["held_out_loss"].items()}
    return check | {"held_out_loss": losses, "pairs": [pair | {"a": "merged"} for pair in check["pairs"]]}


def _more_texts(artifact: str, value: Any) -> Any:
    """The artifact with what a run has there at times."""
    if artifact == "metrics":
        return value | {"notes": ["A note."]}
    if artifact == "data_report":
        repeat = {"train_id": "t9", "question_id": "q0", "train_question": "Which?", "similarity": 91.5, "overlap": 0.5}
        return value | {"repeats": [repeat | {"exact": False}]}
    if artifact == "merged_metrics":
        return value | {"not_measured": "needs 15.0 GiB"}
    if artifact == "export_check":
        return value | {"files": [{"file": "model.safetensors", "bytes": 1, "sha256": "0" * 64}]}
    return value
