"""Make a 4-bit copy of a model with bfloat16 quantization states, like the copies for Unsloth on the Hub:

    python benchmarks/make_prequantized.py MODEL OUT

`model.quantized_name=OUT` with `model.dtype=float16` then does what a T4 does with such a copy."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medcot_utils.models.dequantized import four_bit_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub id")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, quantization_config=four_bit_config(dtype), device_map={"": 0}
    )
    model.save_pretrained(options.out, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


if __name__ == "__main__":
    main()
