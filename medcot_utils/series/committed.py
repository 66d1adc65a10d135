"""Execute the committed notebooks in order with the embedded default, remove outputs that vary, and check them.

python -m medcot_utils.series.committed execute | check | results | diagrams | engine-calls | setup-cells [owner/name]"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from medcot_utils.errors import MedcotError
from medcot_utils.machine import redaction
from medcot_utils.machine.paths import HOME
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import STEPS
from medcot_utils.series import diagram, engine_calls, results
from medcot_utils.series import setup_cell as shared
from medcot_utils.series.runner import QUIET_KERNEL, notebooks_dir

_ABSOLUTE_PATH = re.compile(r"(?<![\w/.:~-])/(?:home|root|Users|tmp|var|mnt|opt|usr|work|kaggle|content)/\w")
_MOST_LINES, _MOST_PARAMETER_LINES = 15, 8


def clean(notebook: Any) -> Any:
    """Clean a notebook in place, and return it.

    Streams are merged, progress bars keep only their last state, and widgets, timestamps, secrets, and details of the machine
    are removed."""
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        kept = ("tags", *shared.COLLAPSED)
        cell.metadata = {name: cell.metadata[name] for name in kept if cell.metadata.get(name)}
        if cell.cell_type == "code":
            cell.outputs = redaction.clear_outputs(_merged_streams(cell.outputs))
            for output in cell.outputs:
                if output.output_type in ("display_data", "execute_result"):
                    output.metadata = {}
    return notebook


def _merged_streams(outputs: list[Any]) -> list[Any]:
    # Progress bars and printed lines arrive in turns. Each stream becomes one output, in order of appearance.
    merged: list[Any] = []
    for output in outputs:
        twin = next((o for o in merged if o.output_type == "stream" and o.name == output.get("name")), None)
        if output.output_type == "stream" and twin is not None:
            twin.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            lines = [line.rsplit("\r", 1)[-1] for line in output.text.replace("\r\n", "\n").split("\n")]
            output.text = "\n".join(lines)
    return [output for output in merged if output.output_type != "stream" or output.text.strip()]


def faults(path: Path) -> list[str]:
    """Return one line per fault of a committed notebook; an empty list if there are none."""
    notebook, found = nbformat.read(path, as_version=4), []
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if not any(cell.outputs for cell in code):
        found.append("has no outputs")
    if counts != list(range(1, len(code) + 1)):
        found.append(f"cells did not run in order from a fresh kernel: {counts}")
    if "widgets" in notebook.metadata:
        found.append("metadata.widgets is kept")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec is not python3")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        found.append("shows an error")
    if match := _ABSOLUTE_PATH.search(text):
        found.append(f"holds an absolute path ({match.group(0)}...)")
    if kind := redaction.kind_of(text):
        found.append(f"holds what looks like a secret: {kind.removeprefix('what looks like ')}")
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(parameters) != 1 or parameters[0].source.count("\n") >= _MOST_PARAMETER_LINES:
        found.append(f"needs one parameters cell of at most {_MOST_PARAMETER_LINES} lines")
    if too_long := [index for index, cell in enumerate(code) if cell.source.count("\n") >= _MOST_LINES]:
        found.append(f"code cells {too_long} have more than {_MOST_LINES} lines")
    if not any("nbval-check-output" in cell.metadata.get("tags", []) for cell in code):
        found.append("marks no output for comparison (nbval-check-output)")
    return found


def read_setup_cell(path: Path) -> str:
    """Return the code of the cell after the parameters cell, which must be the same in all seven notebooks."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return code[1].source


def check() -> list[str]:
    """Return one line per fault of the seven notebooks and of the documents that give their numbers."""
    paths = [notebooks_dir() / f"{name}.ipynb" for name in STEPS]
    lines = [f"{path.name}: {fault}" for path in paths for fault in faults(path)]
    if len({read_setup_cell(path) for path in paths}) > 1:
        lines.append("the setup cell is not the same text in all seven notebooks")
    return lines + diagram.faults(paths) + engine_calls.faults() + shared.faults() + results.faults()


def execute() -> None:
    """Run the seven notebooks in order with their own defaults in a fresh run directory, clean them, and write them back.

    They run in a folder `notebooks` of their own, so that their outputs name runs/notebooks as a user's do. Their numbers are
    written to docs/demo.json, and from there to the README and docs/results.md."""
    from nbclient import NotebookClient

    from medcot_utils.run.directory import Run
    from medcot_utils.run.manifest import describe_costs

    folder = notebooks_dir()
    with tempfile.TemporaryDirectory() as temporary:
        beside, run_dir = Path(temporary) / "notebooks", Path(temporary) / "runs" / "notebooks"
        beside.mkdir()
        os.environ |= {"MEDCOT_HOME": str(HOME), "MEDCOT_RUN_DIR": str(run_dir)}
        for name in STEPS:
            path = folder / f"{name}.ipynb"
            notebook = nbformat.read(path, as_version=4)
            client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(beside)}})
            client.extra_arguments = QUIET_KERNEL
            client.execute()
            nbformat.write(clean(notebook), path)
            say(f"{name}: {describe_costs(Run.open(run_dir).manifest()['steps'][name])}", flush=True)
        results.write_results(Run.open(run_dir))


if __name__ == "__main__":
    if sys.argv[1:] == ["execute"]:
        execute()
    elif sys.argv[1:] == ["check"]:
        if lines := check():
            sys.exit("\n".join(lines))
        say("the committed notebooks are executed, in order and clean")
    elif sys.argv[1:] == ["results"]:
        for path in results.write_documents():
            say(path.name)
    elif sys.argv[1:] == ["diagrams"]:
        diagram.write_pipelines()
    elif sys.argv[1:] == ["engine-calls"]:
        engine_calls.write_calls()
    elif sys.argv[1:2] == ["setup-cells"] and len(sys.argv) <= 3:
        try:
            for path in shared.write(new_repository=sys.argv[2] if len(sys.argv) == 3 else None):
                say(path.name)
        except MedcotError as error:
            sys.exit(f"medcot: {error}")
    else:
        sys.exit(__doc__)
