"""One way to answer, measured in a process of its own: the article's one question at a time, or this project's batches."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=["article", "batches"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--prompts", type=int, default=1, help="how many, all in one batch")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    with Path(options.rows).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    from medcot_utils.data.prompts import inference_prompt

    prompts = [inference_prompt(rows[index % len(rows)]["Question"], False) for index in range(options.prompts)]
    answer, tokenizer, what = {"article": article, "batches": batches}[options.way](options, prompts)
    import torch

    seconds, made = [], []
    for _ in range(3):
        _wait(torch)
        began = time.perf_counter()
        completions = answer()
        _wait(torch)
        seconds.append(round(time.perf_counter() - began, 3))
        made.append(sum(_length(row, tokenizer.eos_token_id) for row in completions))
    result = {
        "way": options.way,
        "what": what,
        "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "seconds": seconds,
        "first_call_extra_seconds": round(seconds[0] - min(seconds[1:]), 2),
        "tokens_per_second": round(made[-1] / min(seconds[1:]), 1),
    }
    if torch.cuda.is_available():
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


def article(options: argparse.Namespace, prompts: list[str]):
    """The article's call: Unsloth, 4 bits, one prompt, `generate(max_new_tokens=..., use_cache=True)`."""
    import unsloth  # noqa: F401 - before torch's other users
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model, max_seq_length=2048, dtype=None, load_in_4bit=True, use_exact_model_name=True
    )
    FastLanguageModel.for_inference(model)

    def answer() -> list[list[int]]:
        completions = []
        for prompt in prompts:
            inputs = tokenizer([prompt], return_tensors="pt").to("cuda")
            made = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=options.max_new_tokens,
                use_cache=True,
                do_sample=False,
            )
            completions.append(made[0, inputs.input_ids.shape[1] :].tolist())
        return completions

    return answer, tokenizer, "Unsloth, 4-bit, one question at a time"


def batches(options: argparse.Namespace, prompts: list[str]):
    """This project's way: `batches.choose_cache` decides, `generation.complete` answers."""
    from medcot_utils.config import load_config
    from medcot_utils.models.engine import get_engine

    overrides = [f"model.name={options.model}", f"generation.max_new_tokens={options.max_new_tokens}"]
    config = load_config("article", [*overrides, "generation.do_sample=false", *options.set])
    engine = get_engine(config.model, fast_answers=config.generation.cache_implementation != "dynamic")
    from medcot_utils.models.batches import choose_cache
    from medcot_utils.models.generation import complete

    model, tokenizer = engine.load(config.model)
    model = engine.for_inference(model)
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    cache = choose_cache(model, config.generation, len(prompts), longest, options.max_new_tokens)
    if cache == "static":
        from medcot_utils.models.static_cache import convert_for_static_cache

        model = convert_for_static_cache(model)
    settings = config.generation.model_copy(update={"cache_implementation": cache})

    def answer() -> list[list[int]]:
        return complete(model, tokenizer, prompts, settings, longest)

    return answer, tokenizer, "16-bit, static cache, compiled" if cache == "static" else "4-bit, growing cache"


def _length(row: list[int], eos_token_id: int) -> int:
    return row.index(eos_token_id) + 1 if eos_token_id in row else len(row)


def _wait(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
