"""Measure the limits of the GPU itself: a large bf16 matrix product, one with the model's own shape, and a copy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    import torch
    from triton.testing import do_bench

    def tflops(rows: int, inner: int, columns: int) -> float:
        a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
        return round(2 * rows * inner * columns / do_bench(lambda: a @ b.T, return_mode="median") / 1e9, 1)

    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
    result = {
        "matrix_product_tflops": tflops(8192, 8192, 8192),
        "mlp_shape_tflops": tflops(6144, 4096, 14336),
        "copy_gb_per_second": round(2 * source.numel() * source.element_size() / milliseconds / 1e6, 1),
    }
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
