"""For the tests of the Hub: a finished run without a model, and how `medcot push` is called."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from hub_server import WRITE

from medcot_utils.config import load_config
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run

MEDCOT = [sys.executable, "-m", "medcot_utils"]


def hub_environment(url: str, home: Path, token: str | None = WRITE) -> dict[str, str]:
    """The environment of a process whose Hub is the test's: read by huggingface_hub when it is imported, so set before."""
    unwanted = (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    )
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment | ({"HF_TOKEN": token} if token else {})


def push_command(run: Run, *options: str, repo_id: str = "doctor/cot") -> list[str]:
    return [*MEDCOT, "push", str(run.path), "--repo-id", repo_id, *options]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}


def fill_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "embedded:tiny-random-llama"}')
    (folder / "adapter_model.safetensors").write_bytes(b"adapter " * 25_000)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


# What is pushed does not depend on these measurements, which the made-up run does not hold.
LESS = ("evaluation.base_16bit_loss=false", "evaluation.measure_merged=false", "export.merge_into=base_16bit")


def fill_merged(weights: int, folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"".join(b"%09d\n" % n for n in range(weights // 10)))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def make_run(root: Path, *overrides: str, weights: int = 300_000, name: str = "run") -> Run:
    """Every artifact of a run in `root/name`, made up, with so many bytes of merged weights."""
    run = Run.create(root / name, load_config("smoke", [*LESS, *overrides]))
    pair = {"mean_logprob_difference": 0.001, "same_greedy": 3, "prompts": 3}
    pairs = [{"a": "merged", "b": b} | pair for b in ("16-bit base + adapter", "4-bit base + adapter")]
    losses = {"merged": 3.2, "4-bit base + adapter": 3.3}
    loss = {"base": interval(3.99), "tuned": interval(3.18), "difference": interval(-0.81)}
    made = {
        "adapter": fill_adapter,
        "merged": partial(fill_merged, weights),
        "metrics": {"n_questions": 24, "metrics": {"eval_loss": loss}, "notes": []},
        "data_report": {"repeats": [], "repeats_dropped": True},
        "plan": {"rows": 117, "effective_batch": 4, "steps": 6, "trainable_parameters": 32768, "total_parameters": 10**6},
        "export_check": {"tolerance": 0.02, "ok": True, "pairs": pairs, "held_out_rows": 8, "held_out_loss": losses},
    }
    plain = {".parquet": lambda path: path.write_bytes(b"rows"), ".json": [], ".jsonl": []}
    for artifact, about in ARTIFACTS.items():
        if about.when is None:
            run.write(artifact, made.get(artifact, plain.get(Path(about.file).suffix, "text\n")))
    return run
