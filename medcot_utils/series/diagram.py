"""Draw the pipeline of the seven notebooks, and put it into each title cell, with that notebook marked.

The picture is an attachment of the cell, so Kaggle and Colab show it even if the notebook is opened alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import nbformat

from medcot_utils.run.artifacts import STEPS
from medcot_utils.series.runner import notebooks_dir

FILE = "pipeline.png"
# {notebook: (its name in the picture, what it leaves in the run directory)}
_BOXES = {
    "01_setup": ("1 setup", "configuration"),
    "02_baseline_inference": ("2 baseline\ninference", "the base's\nanswers"),
    "03_dataset_prep": ("3 dataset\npreparation", "tokens\nand labels"),
    "04_lora_config": ("4 LoRA\nconfiguration", "arguments,\nbatch plan"),
    "05_training": ("5 training", "adapter,\nlosses"),
    "06_comparison": ("6 comparison", "verdicts,\nreport"),
    "07_export": ("7 export", "merged model,\nmodel card"),
}
# The picture has its own background, so that it looks the same on a dark page.
_PAPER, _INK, _BOX, _HERE = "#f6f8fa", "#24292f", "#ffffff", "#0072B2"


def draw_pipeline(here: str) -> bytes:
    """Return a PNG that shows the seven notebooks in order and what each leaves in the run directory, with `here` marked."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    from PIL import Image

    figure = Figure(figsize=(9.2, 1.9), dpi=110, facecolor=_PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 7), ylim=(0, 1.9))
    axes.axis("off")
    for index, (step, (name, makes)) in enumerate(_BOXES.items()):
        middle, marked = index + 0.5, step == here
        face, ink = (_HERE, _BOX) if marked else (_BOX, _INK)
        axes.add_patch(
            FancyBboxPatch((index + 0.07, 1.02), 0.8, 0.5, boxstyle="round,pad=0.02,rounding_size=0.06", fc=face, ec=_INK, lw=0.8)
        )
        axes.text(middle - 0.03, 1.27, name, ha="center", va="center", color=ink, fontsize=9, weight="bold")
        if marked:
            axes.text(middle - 0.03, 1.7, "you are here", ha="center", va="center", color=_HERE, fontsize=9, weight="bold")
        if index:
            axes.annotate(
                "", (index + 0.05, 1.27), (index - 0.11, 1.27), arrowprops={"arrowstyle": "-|>", "color": _INK, "lw": 1}
            )
        axes.annotate(
            "", (middle - 0.03, 0.62), (middle - 0.03, 0.99), arrowprops={"arrowstyle": "<|-|>", "color": _INK, "lw": 0.7}
        )
        axes.text(middle - 0.03, 0.42, makes, ha="center", va="center", color=_INK, fontsize=8.5)
    axes.add_patch(
        FancyBboxPatch((0.07, 0.2), 6.8, 0.42, boxstyle="round,pad=0.02,rounding_size=0.06", fc="none", ec=_INK, lw=0.8)
    )
    axes.text(
        3.47,
        0.08,
        "the run directory: all that one notebook hands to the next",
        ha="center",
        va="center",
        color=_INK,
        fontsize=8.5,
    )
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(32).save(small, format="png", optimize=True)
    return small.getvalue()


def describe_pipeline(here: str) -> str:
    """Return the picture's alt text."""
    names = ", ".join(" ".join(name.split()) for name, _ in _BOXES.values())
    marked = " ".join(_BOXES[here][0].split())
    return f"The seven notebooks in order: {names}. Each reads and writes the run directory. You are here: {marked}"


def faults(paths: Iterable[Path]) -> list[str]:
    """Return one line for each notebook whose title cell lacks its picture."""
    titles = {path: nbformat.read(path, as_version=4).cells[0] for path in paths}
    return [
        f"{path.name}: no picture of the pipeline: python -m medcot_utils.series.committed diagrams"
        for path, title in titles.items()
        if describe_pipeline(path.stem) not in title.source or FILE not in title.get("attachments", {})
    ]


def write_pipelines(folder: Path | None = None) -> None:
    """Put each notebook's picture under the heading of its title cell, in place of any older one."""
    for step in STEPS:
        path = (folder or notebooks_dir()) / f"{step}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0]
        heading, *rest = [part for part in title.source.split("\n\n") if f"](attachment:{FILE})" not in part]
        title.source = "\n\n".join([heading, f"![{describe_pipeline(step)}](attachment:{FILE})", *rest])
        title.attachments = {FILE: {"image/png": base64.b64encode(draw_pipeline(step)).decode()}}
        nbformat.write(notebook, path)
