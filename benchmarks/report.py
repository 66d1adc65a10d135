"""Make the table and the figure of docs/benchmarks.md from a results file of `run.py`:

python benchmarks/report.py benchmarks/results/NAME.json [benchmarks/results/NAME-series.json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- begin: made by benchmarks/report.py -->", "<!-- end -->"
# Multiplications and additions that LoRA training needs per token and weight: 2 for the forward pass, and 2 for the gradients of
# the inputs. The weights' own gradients are not needed; recomputed activations and padding are not counted.
OPERATIONS = 4
# Weights in matrix products: all of the 8.03e9 except the token embedding, which is looked up.
MULTIPLIED_WEIGHTS = 8.03e9 - 128256 * 4096


def share_of_ceiling(tokens_per_second: float, found: dict[str, Any]) -> float:
    """Return the needed operations per second divided by the GPU's measured rate of a bf16 matrix product."""
    return tokens_per_second * OPERATIONS * MULTIPLIED_WEIGHTS / (found["ceiling"]["matrix_product_tflops"] * 1e12)


def worst_loss_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest relative difference of two runs' losses at any logged step."""
    return max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))


def training_table(found: dict[str, Any]) -> list[str]:
    names = {"training a": "TRL + PEFT + bitsandbytes", "training b": "Unsloth, the article's arguments", "training c": "medcot"}
    lines = ["| training, 8 rows a step | how | step | tokens/s | compared with b | share of ceiling | peak reserved |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    reference = found["training b"]["tokens_per_second"]
    for name, label in names.items():
        result = found[name]
        step = sum(result["step_seconds"]) / len(result["step_seconds"])
        rate = result["tokens_per_second"]
        lines.append(
            f"| {label} | {result['what']} | {step:.2f} s | {rate:,.0f} | {rate / reference:.2f}x | "
            f"{share_of_ceiling(rate, found):.0%} | {result['peak_reserved_gib']:.1f} GiB |"
        )
    return lines


def generation_table(found: dict[str, Any]) -> list[str]:
    heads = "prompts at once | tokens/s | compared with one at a time | share of the limit | first call adds | peak reserved"
    lines = [f"| answers, greedy | {heads} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    reference = found["generation article"]["tokens_per_second"]
    for name in [name for name in found if name.startswith("generation ")]:
        result = found[name]
        share = "not recorded"  # in the first results files
        if needed := result.get("bytes_needed_per_token"):
            share = f"{result['tokens_per_second'] * needed / found['ceiling']['copy_gb_per_second'] / 1e9:.0%}"
        lines.append(
            f"| {result['what']} | {result['prompts']} | {result['tokens_per_second']:,.0f} | "
            f"{result['tokens_per_second'] / reference:.0f}x | {share} | {result['first_call_extra_seconds']:.0f} s | "
            f"{result['peak_reserved_gib']:.1f} GiB |"
        )
    return lines


def cards_table(found: dict[str, Any]) -> list[str]:
    names = [name for name in ("cards 1", "cards 2", "cards 4") if name in found and "error" not in found[name]]
    if not names:
        return []
    lines = ["", "| GPUs, 32 rows a step | how | tokens/s | compared with one |", "| --- | --- | --- | --- |"]
    for name in names:
        result = found[name]
        ratio = result["tokens_per_second"] / found["cards 1"]["tokens_per_second"]
        lines.append(f"| {result['cards']} | {result['what']} | {result['tokens_per_second']:,.0f} | {ratio:.2f}x |")
    return lines


def series_table(series: dict[str, Any] | None) -> list[str]:
    """Return lines with the seconds of each notebook of whole runs, training's memory, and the peak GPU memory of a notebook."""
    if series is None:
        return []
    runs = {name: run for name, run in series.items() if isinstance(run, dict)}
    lines = [
        "",
        f"{series['what']}, on one {series['card']}, seconds:",
        "",
        "| notebook | " + " | ".join(map(_shown, runs)) + " |",
    ]
    lines.append("| --- |" + " --- |" * len(runs))
    for step in next(iter(runs.values()))["steps"]:
        states = [run["steps"][step] for run in runs.values()]
        shown = [f"{state['seconds']:.0f}" if state["state"] == "done" else state["state"] for state in states]
        lines.append(f"| {step} | " + " | ".join(shown) + " |")
    memory = [run["memory_gb"] for run in runs.values()]
    lines.append(
        "| training: GB estimated / in use / reserved | " + " | ".join(" / ".join(map(str, m.values())) for m in memory) + " |"
    )
    most = [[state.get("peak_gpu_memory_mb") for state in run["steps"].values()] for run in runs.values()]
    reserved = [max((card["reserved"] / 1e3 for card in cards if card), default=None) for cards in most]
    lines.append(
        "| most in any notebook: GB reserved | " + " | ".join(f"{gb:.1f}" if gb else "not recorded" for gb in reserved) + " |"
    )
    lines += [f"\n{name[0].upper()}{name[1:]}: {run['note']}." for name, run in runs.items() if "note" in run]
    return lines


def _shown(name: str) -> str:
    return name.replace("card", "GPU")  # the first results files say card


def sentences(found: dict[str, Any]) -> list[str]:
    a, b, c = (found[f"training {variant}"] for variant in "abc")
    ceiling, profile = found["ceiling"], c["profile_seconds_per_step"]
    t4 = found["training c as on a T4"]
    bfloat16, float32 = (found[f"losses a in {dtype}"] for dtype in ("bfloat16", "float32"))
    busy = {kind: seconds for kind, seconds in profile.items() if kind != "wall"}
    total = sum(busy.values())
    shares = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in busy.items())
    versions = found["environment"]["versions"]
    return [
        f"GPU: {found['environment']['cards'][0]}; torch {versions['torch']}, unsloth {versions['unsloth']}, "
        f"trl {versions['trl']}. Measured ceiling: {ceiling['matrix_product_tflops']:.0f} TFLOP/s in a bf16 matrix product "
        f"({ceiling['mlp_shape_tflops']:.0f} in one of the model's shape), {ceiling['copy_gb_per_second']:,.0f} GB/s in a copy.",
        "",
        f"Losses at every step: c within {worst_loss_difference(c, b):.2%} of b and {worst_loss_difference(c, a):.2%} of a, from "
        f"which b itself is {worst_loss_difference(b, a):.2%} away. "
        f"First step, compilation included: a {a['first_step_seconds']:.0f} s, b {b['first_step_seconds']:.0f} s, "
        f"c {c['first_step_seconds']:.0f} s.",
        "",
        f"The precision between the layers explains a's distance: with bfloat16 there, as in b and c, a is within "
        f"{worst_loss_difference(bfloat16, c):.2%} of c. With everything in float32, a is within "
        f"{worst_loss_difference(float32, a):.2%} of a above, and c in float16 is within "
        f"{worst_loss_difference(t4, float32):.2%} of that.",
        "",
        f"GPU time of one step of c: {shares} ({profile['wall']:.2f} s of wall time, profiled).",
        "",
        f"Rehearsal of a T4 (float16, 14.5 GiB allowed, unpadded batches; not a T4's speed): {t4['what']}, "
        f"{t4['peak_reserved_gib']:.1f} GiB reserved at most, {t4['skipped_steps']} steps skipped by GradScaler, "
        f"{t4['tokens_per_second']:,.0f} tokens/s on this GPU.",
    ]


def figure(found: dict[str, Any]):
    """Return a figure with two panels of horizontal bars, training and answering, in tokens per second."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(8.4, 2.9), layout="constrained", dpi=110)
    training = {"TRL + PEFT": "training a", "Unsloth, article": "training b", "medcot": "training c"}
    answers = {"Unsloth, one at a time": "generation article", "16 at once": "generation 16", "64 at once": "generation 64"}
    panels = [("Training, 8 rows a step", training), ("Answers", answers)]
    for axes, (title, names) in zip(made.subplots(1, 2), panels, strict=True):
        rates = [found[name]["tokens_per_second"] for name in names.values()]
        colours = ["#0072B2" if label == "medcot" or "at once" in label else "#999999" for label in names]
        bars = axes.barh(list(names), rates, color=colours)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        axes.set(title=title, xlabel="tokens per second")
        axes.margins(x=0.18)
        axes.locator_params(axis="x", nbins=4)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("series", type=Path, nargs="?", help="whole runs of the series: {name: {steps, memory_gb, ...}}")
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    series = json.loads(options.series.read_text(encoding="utf-8")) if options.series else None
    made = [
        "![Tokens per second in training and in generating answers](benchmarks.png)",
        "",
        *training_table(found),
        "",
        *generation_table(found),
        *cards_table(found),
        *series_table(series),
        "",
        *sentences(found),
    ]
    page = DOCS / "benchmarks.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text("\n".join([before + BEGIN, "", *made, "", END]) + after, encoding="utf-8")
    figure(found).savefig(DOCS / "benchmarks.png")


if __name__ == "__main__":
    main()
