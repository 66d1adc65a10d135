"""The engines' calls that notebooks 02 and 04 show: cut from the source, and the committed cells are what it is now."""

from __future__ import annotations

import ast
import re
import shutil

import nbformat
import pytest

from medcot_utils.series import engine_calls
from medcot_utils.series.engine_calls import cut_call
from medcot_utils.series.runner import notebooks_dir


def test_a_call_is_cut_out_whole_and_is_code():
    call = cut_call("transformers_engine.py", "add_lora", "get_peft_model")
    assert call.startswith("get_peft_model(\n    model,\n    LoraConfig(\n        r=settings.r,") and call.endswith("\n)")
    ast.parse(call)
    with pytest.raises(LookupError, match=r"unsloth_engine\.py: load does not call LoraConfig"):
        cut_call("unsloth_engine.py", "load", "LoraConfig")


def test_the_committed_notebooks_show_what_the_engines_call(tmp_path, monkeypatch):
    assert engine_calls.faults() == []
    models = shutil.copytree(engine_calls._MODELS, tmp_path / "models")
    file = models / "unsloth_engine.py"
    file.write_text(file.read_text().replace("loftq_config=None", "loftq_config={}"))
    monkeypatch.setattr(engine_calls, "_MODELS", models)
    assert [fault.split(":")[0] for fault in engine_calls.faults()] == ["04_lora_config.ipynb"]


def test_a_cell_is_replaced_and_not_added(tmp_path):
    folder = shutil.copytree(notebooks_dir(), tmp_path / "notebooks")
    engine_calls.write_calls(folder)
    for name in ("02_baseline_inference", "04_lora_config"):
        cells = nbformat.read(folder / f"{name}.ipynb", as_version=4).cells
        assert sum(cell.source.startswith(engine_calls._BEGINNING) for cell in cells) == 1
    assert engine_calls.faults(folder) == []


def test_a_comment_that_is_too_wide_stands_above_its_line():
    short, code = "    r=settings.r,  # the rank", "    target_modules=list(settings.target_modules),"
    assert engine_calls._shorten(short) == short and engine_calls._shorten(code + "," * 80) == code + "," * 80
    assert (
        engine_calls._shorten(f"{code}  # the projections that get matrices")
        == f"    # the projections that get matrices\n{code}"
    )
    for _, _, section, groups in engine_calls._SHOWN:
        shown = engine_calls.describe_calls(section, groups)
        assert not [line for line in shown.splitlines() if "  # " in line.lstrip() and len(line) > 76]
        assert [ast.parse(code) for code in re.findall(r"```python\n(.*?)```", shown, re.DOTALL)], "still code"
