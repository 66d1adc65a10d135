"""Fast answers on a real GPU, each in a process of its own: Unsloth's patches must not reach the static cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys
from medcot_utils.config import load_config
from medcot_utils.models.engine import get_engine

name, dtype, cache, quantized = sys.argv[1:]
config = load_config("smoke", [f"model.name={name}", f"model.dtype={dtype}", f"generation.cache_implementation={cache}",
    "generation.max_new_tokens=48", "generation.batch_size=4", f"model.load_in_4bit={quantized}"])
engine = get_engine(config.model, fast_answers=True)
from medcot_utils import data
from medcot_utils.models.generation import answer_questions
model, tokenizer = engine.load(config.model)
model = engine.for_inference(model)
questions = [{"id": str(i), "Question": row["Question"]} for i, row in enumerate(data.load_rows(config.dataset).select(range(7)))]
records = answer_questions(model, tokenizer, questions, config.generation, True, 0)
print("RECORDS" + json.dumps([record["completion"] for record in records]))
"""


# What Unsloth does on a T4 alone, made to run on any GPU.
PACKED = """
import json, os, sys
os.environ["UNSLOTH_BNB_GEMM_4BIT"] = "1"
from medcot_utils.config import load_config
from medcot_utils.models.engine import get_engine

config = load_config("smoke", [f"model.name={sys.argv[1]}", "model.engine=unsloth", "model.dtype=float16"])
engine = get_engine(config.model)
import bitsandbytes
from medcot_utils.models.batch_check import _make_prompts, compare_batch, switch_off_packed

calls, multiply = [], bitsandbytes.matmul_4bit
bitsandbytes.matmul_4bit = lambda *given, **named: calls.append(tuple(given[0].shape[:2])) or multiply(*given, **named)
model, tokenizer = engine.load(config.model)
model, found = engine.for_inference(model), {}
for way in ("packed", "unpacked"):
    check = compare_batch(model, tokenizer, _make_prompts(), config.generation)
    found[way] = {"agrees": check.agrees, "said": str(check), "products of 16 tokens": calls.count((16, 1))}
    calls.clear()
    switch_off_packed()
print("RECORDS" + json.dumps(found))
"""


def run_script(script: str, *arguments: str) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RECORDS")).removeprefix("RECORDS"))


def answers(model: str, dtype: str, cache: str, quantized: str = "true") -> list[str]:
    return run_script(SCRIPT, model, dtype, cache, quantized)


@pytest.mark.parametrize("quantized", ["true", "false"])
def test_compiled_answers_equal_a_growing_caches_in_float32(wide_llama, quantized):
    """In float32 rounding is too small to choose another token, so a wrong mask, position or weight would show."""
    growing = answers(wide_llama, "float32", "dynamic", quantized)
    assert len(growing) == 7 and len(set(growing)) > 1
    assert answers(wide_llama, "float32", "static", quantized) == growing


def test_packed_4_bit_products_give_a_batch_its_rows_own_logits(wide_llama):
    found = run_script(PACKED, wide_llama)
    print(found)
    assert found["packed"]["products of 16 tokens"] > 0 == found["unpacked"]["products of 16 tokens"], "switched off"
    assert found["packed"]["agrees"] and found["unpacked"]["agrees"]
