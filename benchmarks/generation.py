"""Measure one way to generate answers, in its own process: the article's single questions, or this project's batches."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=["article", "batches"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--prompts", type=int, default=1, help="number of prompts, all in one batch")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    with Path(options.rows).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    from medcot_utils.data.prompts import inference_prompt

    prompts = [inference_prompt(rows[index % len(rows)]["Question"], False) for index in range(options.prompts)]
    answer, what, needed = {"article": article, "batches": batches}[options.way](options, prompts)
    import torch

    seconds, made = [], []
    for _ in range(3):
        _wait(torch)
        began = time.perf_counter()
        lengths = answer()
        _wait(torch)
        seconds.append(round(time.perf_counter() - began, 3))
        made.append(sum(lengths))
    result = {
        "way": options.way,
        "what": what,
        "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "seconds": seconds,
        "first_call_extra_seconds": round(seconds[0] - min(seconds[1:]), 2),
        "tokens_per_second": round(made[-1] / min(seconds[1:]), 1),
        "bytes_needed_per_token": round(needed),
    }
    if torch.cuda.is_available():
        result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


def article(options: argparse.Namespace, prompts: list[str]):
    """Prepare the article's call: Unsloth, 4 bits, one prompt, `generate(max_new_tokens=..., use_cache=True)`.

    Return a function that answers all prompts and returns the tokens of each, a description, and `bytes_needed`."""
    import unsloth  # noqa: F401 - before other libraries that use torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model, max_seq_length=2048, dtype=None, load_in_4bit=True, use_exact_model_name=True
    )
    FastLanguageModel.for_inference(model)

    def answer() -> list[int]:
        lengths = []
        for prompt in prompts:
            inputs = tokenizer([prompt], return_tensors="pt").to("cuda")
            made = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=options.max_new_tokens,
                use_cache=True,
                do_sample=False,
            )
            lengths.append(_length(made[0, inputs.input_ids.shape[1] :].tolist(), tokenizer.eos_token_id))
        return lengths

    return answer, "Unsloth, 4-bit, one question at a time", bytes_needed(model, tokenizer, prompts, options.max_new_tokens)


def batches(options: argparse.Namespace, prompts: list[str]):
    """Prepare this project's way, as `generation.decide` decides. Return the same as `article`."""
    from medcot_utils.config import load_config
    from medcot_utils.models.engine import get_engine

    overrides = [f"model.name={options.model}", f"generation.max_new_tokens={options.max_new_tokens}"]
    config = load_config("article", [*overrides, "generation.do_sample=false", *options.set])
    engine = get_engine(config.model, fast_answers=config.generation.cache_implementation != "dynamic")
    from medcot_utils.models.batches import count_read_at_once, split
    from medcot_utils.models.deal import Asked, Batch
    from medcot_utils.models.generation import convert_to_write, decide, make_writer

    model, tokenizer = engine.load(config.model)
    model = engine.for_inference(model)
    asked = [Asked(str(index), prompt) for index, prompt in enumerate(prompts)]
    how = decide(model, tokenizer, asked, config.generation, None)
    how = replace(how, settings=how.settings.model_copy(update={"batch_size": len(prompts)}))
    writer = make_writer(convert_to_write(model, how), tokenizer, how)  # one for all calls, because the first compiles
    static = how.settings.cache_implementation == "static"
    together = split(
        sorted(asked, key=lambda one: -len(one.prompt)), count_read_at_once(len(prompts)) if static else len(prompts)
    )

    def answer() -> list[int]:
        waiting = iter([Batch(batch, batch) for batch in together])
        return [record["completion_tokens"] for records in writer.write(lambda: next(waiting, None)) for record in records]

    weights = "16-bit" if how.in_16_bits else "4-bit"
    what = f"{weights}, slots of one cache, compiled" if static else f"{weights}, growing cache"
    return answer, what, bytes_needed(model, tokenizer, prompts, options.max_new_tokens)


def bytes_needed(model, tokenizer, prompts: list[str], new_tokens: int) -> float:
    """Return the bytes to read per token: the multiplied 16-bit weights, shared by all rows, and a row's keys and values."""
    from medcot_utils.models.slots import slot_bytes

    weights = 2 * (model.num_parameters() - model.get_input_embeddings().weight.numel())
    held = sum(len(tokenizer(prompt)["input_ids"]) + new_tokens / 2 for prompt in prompts) / len(prompts)
    return weights / len(prompts) + slot_bytes(model, 1) * held


def _length(row: list[int], eos_token_id: int) -> int:
    return row.index(eos_token_id) + 1 if eos_token_id in row else len(row)


def _wait(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
