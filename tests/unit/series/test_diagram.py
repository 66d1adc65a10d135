"""The picture of the pipeline: in each notebook's title cell, with its own place marked, and an alt text."""

from __future__ import annotations

import base64
import io
import shutil

import nbformat
import pytest
from PIL import Image

from medcot_utils.run.artifacts import STEPS
from medcot_utils.series import diagram
from medcot_utils.series.runner import notebooks_dir


def test_each_picture_marks_another_notebook():
    pictures = [diagram.draw_pipeline(step) for step in STEPS]
    assert len(set(pictures)) == 7 and pictures[2] == diagram.draw_pipeline("03_dataset_prep")
    image = Image.open(io.BytesIO(pictures[2])).convert("RGB")
    blue = [x for x in range(image.width) if image.getpixel((x, image.height // 3)) == (0, 114, 178)]
    assert blue and image.width * 2 / 7 < min(blue) and max(blue) < image.width * 3 / 7
    assert image.getpixel((2, 2)) == (246, 248, 250), "a background of its own, for dark pages"


@pytest.mark.parametrize("step", STEPS)
def test_the_committed_notebook_has_its_own_picture(step):
    title = nbformat.read(notebooks_dir() / f"{step}.ipynb", as_version=4).cells[0]
    assert title.source.count(f"![{diagram.describe_pipeline(step)}](attachment:{diagram.FILE})") == 1
    stored = base64.b64decode(title.attachments[diagram.FILE]["image/png"])
    assert Image.open(io.BytesIO(stored)).size == Image.open(io.BytesIO(diagram.draw_pipeline(step))).size


def test_a_picture_is_replaced_and_not_added(tmp_path):
    folder = shutil.copytree(notebooks_dir(), tmp_path / "notebooks")
    diagram.write_pipelines(folder)
    once = (folder / "05_training.ipynb").read_bytes()
    diagram.write_pipelines(folder)
    assert (folder / "05_training.ipynb").read_bytes() == once
