"""Measure with which dtype and which weights the embedded model trains and answers fastest on a CPU, all in one run.

    python benchmarks/cpu.py --out benchmarks/results/NAME.json [--threads 2]

Each way is measured in turn, in several rounds, so that a busy moment of the machine does not affect only one of them."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from functools import partial
from pathlib import Path

from medcot_utils import config as configs
from medcot_utils.models import engine as engines

ROW_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 290, 300, 16
WAYS = tuple(itertools.product(("float32", "bfloat16"), ("4-bit", "unpacked")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[25, 50], help="none: only training")
    options = parser.parse_args()
    engines.quiet_start()
    import torch

    torch.set_num_threads(options.threads)
    seconds: dict[str, dict[str, list[float]]] = {}
    for dtype, weights in WAYS * options.rounds:
        found = seconds.setdefault(f"{dtype}, {weights}", {})
        for name, value in measure(dtype, weights, options.batches).items():
            found.setdefault(name, []).append(value)
    result = {
        "processor": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": options.threads},
        "median seconds": {
            way: {name: round(statistics.median(values), 4) for name, values in found.items()} for way, found in seconds.items()
        },
    }
    first = result["median seconds"]["float32, 4-bit"]
    result["times as fast as float32, 4-bit"] = {
        way: {name: round(first[name] / value, 2) for name, value in found.items()}
        for way, found in result["median seconds"].items()
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measure(dtype: str, weights: str, batches: list[int]) -> dict[str, float]:
    """Return the seconds for one trained row (forward and backward), and for one token of each batch of answers."""
    import torch

    demo = configs.load_config("demo", [f"model.dtype={dtype}"])
    engine = engines.get_engine(demo.model)
    from medcot_utils.models.transformers_engine import dequantize_on_cpu

    model, _ = engine.load(demo.model)
    if weights == "unpacked":
        dequantize_on_cpu(model)
    model = engine.add_lora(model, demo.lora)
    torch.manual_seed(0)
    ids = torch.randint(10, 40000, (1, ROW_TOKENS))
    found = {"a trained row": _best(lambda: model(input_ids=ids, labels=ids).loss.backward(), 3)}
    model.zero_grad(set_to_none=True)
    model.eval()
    if weights == "unpacked":
        engine.for_inference(model)
    for batch in batches:
        prompts = torch.randint(10, 40000, (batch, PROMPT_TOKENS))
        one, many = (_best(partial(_answer, model, prompts, tokens), 1) for tokens in (1, NEW_TOKENS))
        found[f"a token of {batch} answers"] = (many - one) / (NEW_TOKENS - 1)
    return found


def _answer(model, prompts, tokens: int) -> None:
    import torch

    how = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        model.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, **how)


def _best(work, times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
