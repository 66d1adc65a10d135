"""Make the tables and the figure of docs/benchmarks.md from a results file of `run.py`. It must hold the ceiling and training b
and c; other measurements that it does not hold are left out:

python benchmarks/report.py benchmarks/results/NAME.json"""

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


# What stands between a row of the tables and its limit, from the profiles.
BETWEEN = {
    "Unsloth, the article's arguments": "two rows at a time leave the GPU waiting for the processor, and checkpointing computes "
    "the forward pass twice",
    "medcot": "all that is no product with the base's weights (attention, LoRA's small products, norms, unpacking), and waiting "
    "for the processor",
    "as on a T4": "the forward pass is computed twice, the inputs of layers go to RAM and back, and Unsloth compiles no blocks "
    "for joined rows in float16",
    "answers, 1 and 16 at once": "small kernels and the pauses between them; the products are bound by the weights alone",
    "answers, 64 and more": "prompts, which arithmetic limits and not bandwidth; attention; and, from 128, products that take "
    "longer than reading their weights",
}
TRAINED = {
    "training a": "TRL + PEFT + bitsandbytes",
    "training b": "Unsloth, the article's arguments",
    "training c, before": "medcot before: padded rows",
    "training c": "medcot",
    "training b as on a T4": "as on a T4: Unsloth, the article's arguments",
    "training c as on a T4": "as on a T4: medcot",
    "training c as on a T4, from a 4-bit copy": "as on a T4: medcot, from a 4-bit copy with bfloat16 states",
}


def training_table(found: dict[str, Any]) -> list[str]:
    lines = ["| training, 8 rows a step | how | step | tokens/s | compared with Unsloth | share of ceiling | peak reserved |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, label in TRAINED.items():
        if name not in found:
            continue
        result, reference = found[name], found["training b as on a T4" if "T4" in name else "training b"]
        rate = result["tokens_per_second"]
        lines.append(
            f"| {label} | {result['what']} | {result['seconds_per_step']:.2f} s | {rate:,.0f} | "
            f"{rate / reference['tokens_per_second']:.2f}x | {share_of_ceiling(rate, found):.0%} | "
            f"{result['peak_reserved_gib']:.1f} GiB |"
        )
    return lines


def generation_table(found: dict[str, Any]) -> list[str]:
    if "generation article" not in found:
        return []
    heads = "prompts at once | tokens/s | compared with one at a time | share of the limit | first call adds | peak reserved"
    lines = [f"| answers, greedy | {heads} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    reference = found["generation article"]["tokens_per_second"]
    copied = found.get("ceiling of answers", found["ceiling"])["copy_gb_per_second"] * 1e9
    for name in [name for name in found if name.startswith("generation ")]:
        result = found[name]
        lines.append(
            f"| {result['what']} | {result['prompts']} | {result['tokens_per_second']:,.0f} | "
            f"{result['tokens_per_second'] / reference:.1f}x | "
            f"{result['tokens_per_second'] * result['bytes_needed_per_token'] / copied:.0%} | "
            f"{result['first_call_extra_seconds']:.0f} s | {result['peak_reserved_gib']:.1f} GiB |"
        )
    return lines


def mixed_table(found: dict[str, Any]) -> list[str]:
    """Return a table of answers of mixed length, before and now, with 16 rows at once and with as many as fit."""
    names = {"before": ", before", "now": ""}
    rows = [(when, found.get(f"mixed{how}{key}")) for how in (", 16 at once", " as on a T4") for when, key in names.items()]
    rows = [(when, result) for when, result in rows if result]
    if not rows:
        return []
    shortest, median, longest = rows[-1][1]["shortest, median, longest"]
    what = f"{rows[-1][1]['answers']} answers of {shortest} to {longest} tokens (median {median}), as on a T4"
    lines = [
        "",
        f"| {what} | at once | decoding steps | seconds | tokens/s | peak reserved |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for when, result in rows:
        lines.append(
            f"| {when} | {result['rows_at_once']} | {result['decoding_steps']:,} | {result['seconds']} | "
            f"{result['tokens_per_second']:,.0f} | {result['peak_reserved_gib']:.1f} GiB |"
        )
    return lines


def cards_table(found: dict[str, Any]) -> list[str]:
    names = [name for name in found if name.startswith("cards ") and "error" not in found[name]]
    if not names:
        return []
    lines = ["", "| GPUs | rows a step | how | tokens/s | compared with one |", "| --- | --- | --- | --- | --- |"]
    for name in names:
        result = found[name]
        one = found["training c" if result["rows_per_step"] == found["training c"]["rows_per_step"] else "cards 1"]
        lines.append(
            f"| {result['cards']} | {result['rows_per_step']} | {result['what']} | {result['tokens_per_second']:,.0f} | "
            f"{result['tokens_per_second'] / one['tokens_per_second']:.2f}x |"
        )
    if shared := found.get("answers on all cards"):
        lines.append(
            f"\n{shared['answers']} answers as on a T4, in seconds: {shared['seconds_on_one']} on one GPU, "
            f"{shared['seconds_on_all']} on {shared['gpus']} ({shared['times_as_fast']:.2f}x); {shared['answers_that_differ']} "
            f"answers differ. The other GPUs' processes load within {shared['seconds_until_others_are_loaded']} s; "
            f"the first answers meanwhile."
        )
    return lines


def series_table(found: dict[str, Any]) -> list[str]:
    """Return lines with the seconds of each notebook of whole runs, estimated and actual, and their memory."""
    runs = {name.removeprefix("series "): run for name, run in found.items() if name.startswith("series ")}
    if not runs:
        return []
    what = next((run["what"] for run in runs.values() if "what" in run), "Whole runs")
    lines = ["", f"`{what.replace(' on', '` on', 1)}. Seconds, and in brackets those that notebook 01 estimated:", ""]
    lines.append("| notebook | " + " | ".join(map(_shown, runs)) + " |")
    lines.append("| --- |" + " --- |" * len(runs))
    for step in max((run["steps"] for run in runs.values()), key=len):
        lines.append(f"| {step} | " + " | ".join(_seconds(run["steps"].get(step)) for run in runs.values()) + " |")
    memory = [run.get("memory_gb", {}) for run in runs.values()]
    if all(memory):
        lines.append(
            "| training: GB estimated / in use / reserved | "
            + " | ".join(" / ".join(map(str, m.values())) for m in memory)
            + " |"
        )
    own = [[state.get("own_memory_mb") or 0 for state in run["steps"].values()] for run in runs.values()]
    if all(map(any, own)):
        lines.append("| most in any notebook: GB of RAM of its own | " + " | ".join(f"{max(mb) / 1e3:.1f}" for mb in own) + " |")
    most = [[state.get("peak_gpu_memory_mb") for state in run["steps"].values()] for run in runs.values()]
    reserved = [max((card["reserved"] / 1e3 for card in cards if card), default=None) for cards in most]
    lines.append(
        "| most in any notebook: GB reserved | " + " | ".join(f"{gb:.1f}" if gb else "not recorded" for gb in reserved) + " |"
    )
    lines += [f"\n{_shown(name)}: {run['note']}." for name, run in runs.items() if "note" in run]
    return lines


def _seconds(state: dict[str, Any] | None) -> str:
    if state is None or state["state"] != "done":
        return "not finished"
    estimate = f" ({state['estimate']['seconds']:.0f})" if state.get("estimate") else ""
    return f"{state['seconds']:.0f}{estimate}"


def _shown(name: str) -> str:
    return name.replace("card", "GPU")


def sentences(found: dict[str, Any]) -> list[str]:
    b, c, ceiling = found["training b"], found["training c"], found["ceiling"]
    profile, versions = c["profile_seconds_per_step"], found["environment"]["versions"]
    busy = {kind: seconds for kind, seconds in profile.items() if kind != "wall"}
    shares = ", ".join(f"{kind} {seconds / profile['wall']:.0%}" for kind, seconds in busy.items())
    idle = 1 - sum(busy.values()) / profile["wall"]
    lines = [
        f"GPU: {found['environment']['cards'][0]}; torch {versions['torch']}, unsloth {versions['unsloth']}, "
        f"trl {versions['trl']}. Measured ceiling: {ceiling['matrix_product_tflops']:.0f} TFLOP/s in a bf16 matrix product "
        f"({ceiling['mlp_shape_tflops']:.0f} in one of the model's shape), {ceiling['copy_gb_per_second']:,.0f} GB/s in a copy.",
        "",
        f"One step of medcot's training, profiled: {shares}, nothing {idle:.0%} ({profile['wall']:.2f} s). The first step, with "
        f"its compilation, takes {c['first_step_seconds']:.0f} s (Unsloth with the article's arguments: "
        f"{b['first_step_seconds']:.0f} s).",
        "",
        f"Largest difference of the losses at any step: medcot and Unsloth {worst_loss_difference(c, b):.2%}"
        + _difference(found, "training c", "training c, before", "; medcot now and before")
        + _difference(found, "training c as on a T4", "training b as on a T4", "; as on a T4, medcot and Unsloth")
        + ".",
    ]
    if "training a" in found:
        a, t4 = found["training a"], found["training c as on a T4"]
        bfloat16, float32 = (found[f"losses a in {dtype}"] for dtype in ("bfloat16", "float32"))
        lines += [
            "",
            f"TRL's losses differ from medcot's by up to {worst_loss_difference(c, a):.2%}. The precision between the layers "
            f"explains that: with bfloat16 there, as with Unsloth, the difference is {worst_loss_difference(bfloat16, c):.2%}. "
            f"With float32 everywhere, medcot in float16 is within {worst_loss_difference(t4, float32):.2%}.",
        ]
    return lines


def _difference(found: dict[str, Any], ours: str, theirs: str, label: str) -> str:
    if not {ours, theirs} <= set(found):
        return ""
    return f"{label} {worst_loss_difference(found[ours], found[theirs]):.2%}"


def figure(found: dict[str, Any]):
    """Return a figure with two panels of horizontal bars, training and answering, in tokens per second."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(8.4, 2.9), layout="constrained", dpi=110)
    training = {"TRL + PEFT": "training a", "Unsloth, article": "training b", "medcot": "training c"}
    answers = {"Unsloth, one at a time": "generation article"} | {
        f"medcot, {count} at once": f"generation {count}" for count in (1, 16, 64, 192)
    }
    panels = [("Training, 8 rows a step", training), ("Answers", answers)]
    for axes, (title, names) in zip(made.subplots(1, 2), panels, strict=True):
        names = {label: name for label, name in names.items() if name in found}
        rates = [found[name]["tokens_per_second"] for name in names.values()]
        colours = ["#0072B2" if "medcot" in label else "#999999" for label in names]
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
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    made = [
        "![Tokens per second in training and in generating answers](benchmarks.png)",
        "",
        *training_table(found),
        "",
        *generation_table(found),
        *mixed_table(found),
        "",
        "Between these and the limit:",
        "",
        *(f"- {what}: {why}." for what, why in BETWEEN.items()),
        *cards_table(found),
        *series_table(found),
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
