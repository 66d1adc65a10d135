"""Show the calls of both engines, as Markdown cut from their source, because notebooks 02 and 04 name no engine in their code."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable
from pathlib import Path

import nbformat

from medcot_utils.machine.paths import HOME
from medcot_utils.series.runner import notebooks_dir

_MODELS = HOME / "medcot_utils" / "models"
_WIDTH = 76  # characters that fit on one line of a Markdown cell on a page of 800 pixels
_BEGINNING = "The engines make these calls; `settings` is "  # the beginning of a cell that is written here
_UNSLOTH = "Unsloth (`loader` is `FastModel` if the GPU computes in bfloat16, else the article's `FastLanguageModel`)"
# (notebook, heading of the section, section of the settings, [(title, [(file, function, called name)])])
_SHOWN = (
    (
        "02_baseline_inference",
        "## 2.2",
        "model",
        [
            (_UNSLOTH, [("unsloth_engine.py", "load", "loader.from_pretrained")]),
            (
                "transformers and bitsandbytes",
                [
                    ("dequantized.py", "four_bit_config", "BitsAndBytesConfig"),
                    ("transformers_engine.py", "load", "AutoModelForCausalLM.from_pretrained"),
                ],
            ),
        ],
    ),
    (
        "04_lora_config",
        "## 4.2",
        "lora",
        [
            (_UNSLOTH, [("unsloth_engine.py", "add_lora", "loader.get_peft_model")]),
            ("PEFT", [("transformers_engine.py", "add_lora", "get_peft_model")]),
        ],
    ),
)


def cut_call(file: str, function: str, called: str) -> str:
    """Return the source of the first call of `called` in a function of the room `models`, with its comments.

    Raises LookupError if there is no such call: then the table above is out of date."""
    source = (_MODELS / file).read_text(encoding="utf-8")
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function)
    for node in ast.walk(body):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called:
            first, *rest = (ast.get_source_segment(source, node) or "").splitlines()
            return "\n".join([first, textwrap.dedent("\n".join(rest))]) if rest else first
    raise LookupError(f"{file}: {function} does not call {called}")


def describe_calls(section: str, groups: Iterable[tuple[str, list[tuple[str, str, str]]]]) -> str:
    """Return one Markdown cell with a block of code for each engine."""
    parts = [f"{_BEGINNING}`config.{section}`:"]
    for title, calls in groups:
        code = "\n".join(map(_shorten, "\n".join(cut_call(*call) for call in calls).splitlines()))
        parts.append(f"**{title}**\n\n```python\n{code}\n```")
    return "\n\n".join(parts)


def _shorten(line: str) -> str:
    """Return a line of code that fits on a page. If code and comment are too wide together, the comment is above the code."""
    code, mark, comment = line.partition("  # ")
    indent = line[: len(line) - len(line.lstrip())]
    return f"{indent}# {comment}\n{code}" if mark and len(line) > _WIDTH else line


def faults(folder: Path | None = None) -> list[str]:
    """Return one line for each notebook whose cell differs from the engines' calls."""
    return [
        f"{name}.ipynb: the calls in {heading} differ from the engines': python -m medcot_utils.series.committed engine-calls"
        for name, heading, section, groups in _SHOWN
        if describe_calls(section, groups) not in [cell.source for cell in _read(name, folder).cells]
    ]


def write_calls(folder: Path | None = None) -> None:
    """Write each cell after the heading of its section, in place of any older one."""
    for name, heading, section, groups in _SHOWN:
        notebook = _read(name, folder)
        cells = [cell for cell in notebook.cells if not cell.source.startswith(_BEGINNING)]
        place = next(index for index, cell in enumerate(cells) if cell.source.startswith(heading)) + 1
        cell = nbformat.v4.new_markdown_cell(describe_calls(section, groups))
        cell["id"] = f"engine-calls-{section}"
        notebook.cells = [*cells[:place], cell, *cells[place:]]
        nbformat.write(notebook, _path(name, folder))


def _path(name: str, folder: Path | None) -> Path:
    return (folder or notebooks_dir()) / f"{name}.ipynb"


def _read(name: str, folder: Path | None) -> nbformat.NotebookNode:
    return nbformat.read(_path(name, folder), as_version=4)
