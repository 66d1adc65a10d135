"""Make all measurements for the speed claims in one call on one machine:

    python benchmarks/run.py --model PATH --rows FILE --out benchmarks/results/NAME.json

The measurements run one after the other, each in its own process. A later call with `--only` adds to the same file.
`benchmarks/report.py` makes the table and the figure of docs/benchmarks.md from it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BEFORE = ", before"
# The settings of a T4, as far as another GPU can imitate one: float16, its memory, Unsloth's unpadded batches.
REHEARSAL = ["model.dtype=float16", "model.gpu_memory_gib=14.5", "training.padding=padding_free"]


def measurements(cards: int, before: Path | None) -> dict[str, list[str]]:
    """Return {name: command line} in the order of their runs, for a machine of `cards` GPUs.

    Names that end with "before" measure the checkout `before`; without one they are left out."""
    rehearsal = _settings(REHEARSAL)
    training = {
        "training a": ["training.py", "a"],
        "training b": ["training.py", "b"],
        "training c": ["training.py", "c", "--profile"],
        "training c, before": ["training.py", "c"],
        "training b as on a T4": ["training.py", "b", "--as-on-a-t4"],
        "training c as on a T4": ["training.py", "c", *rehearsal],
    }
    # a's losses differ from those of b and c, because a keeps more digits between the layers. These measure a with bfloat16
    # there, as in b and c, and with float32 everywhere.
    losses = {f"losses a in {dtype}": ["training.py", "a", "--precision", dtype] for dtype in ("bfloat16", "float32")}
    static = _settings(["generation.cache_implementation=static"])
    generation = {"generation article": ["generation.py", "article"]} | {
        f"generation {prompts}": ["generation.py", "batches", "--prompts", str(prompts), *static]
        for prompts in (1, 16, 64, 128, 192)
    }
    # The commit of "before" asked Unsloth on a T4, which took at most 16 rows there; this GPU has no such limit.
    mixed = {f"mixed as on a T4{when}": ["mixed.py"] for when in ("", BEFORE)}
    mixed |= {f"mixed, 16 at once{when}": ["mixed.py", *_settings(["generation.batch_size=16"])] for when in ("", BEFORE)}
    series = {"series a large card": ["series.py", "a large card"], "series a large card, before": ["series.py", "a large card"]}
    series["series as on a T4"] = ["series.py", "as on a T4"]
    batch32 = ["training.py", "c", *_settings(["training.gradient_accumulation_steps=16"]), "--num-rows", "96"]
    several = {f"cards {count}": batch32 for count in (1, 2, 4) if cards > 1 and count <= cards}
    if cards > 1:
        several |= {"cards 2, 8 rows": ["training.py", "c"], "answers on all cards": ["gpus.py"]}
    chosen = {"ceiling": ["ceiling.py"]} | training | losses | generation | mixed | several | series
    return {name: command for name, command in chosen.items() if before or not name.endswith(BEFORE)}


def _settings(pairs: list[str]) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def environment() -> dict[str, object]:
    """Return the names of the GPUs and the versions of CUDA, Python, and libraries, for which the figures hold."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "accelerate", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cards": cards, "cuda": torch.version.cuda, "python": platform.python_version(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or Hub id; benchmarks/make_random_8b.py makes one")
    parser.add_argument("--rows", required=True, help="a .jsonl file with Question, Complex_CoT, Response")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout of this project to compare with, such as a git worktree")
    parser.add_argument(
        "--only", nargs="*", help="beginnings of names: ceiling, training, losses, generation, mixed, series, ..."
    )
    options = parser.parse_args()
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    found["environment"] = environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, command in measurements(len(found["environment"]["cards"]), options.before).items():
        if options.only and not any(name.startswith(word) for word in options.only):
            continue
        began = time.perf_counter()
        found[name] = measure(name, command, options)
        print(f"{name}: {time.perf_counter() - began:.0f} s; {_headline(found[name])}", flush=True)
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def measure(name: str, command: list[str], options: argparse.Namespace) -> dict[str, object]:
    """Run one measurement. Return its result, or {"error": the end of its output}."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "result.json"
        script, *arguments = command
        launcher, env = [sys.executable], dict(os.environ)
        processes = int(name.split(",")[0].removeprefix("cards ")) if name.startswith("cards ") else 1
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if script != "gpus.py":
            # A further visible GPU would be used through DataParallel, with twice the rows per step.
            env["CUDA_VISIBLE_DEVICES"] = ",".join(_visible_gpus()[:processes])
        package = options.before if name.endswith(BEFORE) else HERE.parent
        env["PYTHONPATH"] = os.pathsep.join([str(package.resolve()), env.get("PYTHONPATH", "")])
        if script != "ceiling.py":
            arguments += ["--model", options.model, "--rows", str(Path(options.rows).resolve())]
        if script in ("training.py", "series.py"):
            arguments += ["--work", work]
        done = subprocess.run(
            [*launcher, str(HERE.resolve() / script), *arguments, "--out", str(out)],
            env=env,
            cwd=package,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return {"error": (done.stdout + done.stderr)[-3000:]}
        if (profile := out.with_name("profile.txt")).exists():
            options.out.with_suffix(".profile.txt").write_text(profile.read_text())
        return json.loads(out.read_text(encoding="utf-8"))


def _visible_gpus() -> list[str]:
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]


def _headline(result: dict[str, object]) -> str:
    if "error" in result:
        return f"FAILED: {str(result['error'])[-600:]}"
    keys = ("tokens_per_second", "peak_reserved_gib", "first_step_seconds", "first_call_extra_seconds", "matrix_product_tflops")
    return ", ".join(f"{key} {result[key]}" for key in keys if key in result)


if __name__ == "__main__":
    main()
