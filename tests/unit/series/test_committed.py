"""The rules for committed notebooks find what is broken on purpose, cleaning leaves what reads well, and both hold here."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from medcot_utils.run.artifacts import STEPS
from medcot_utils.series import setup_cell
from medcot_utils.series.committed import check, clean, faults, read_setup_cell
from medcot_utils.series.runner import notebooks_dir

ROOT = Path(__file__).parents[3]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def executed():
    """A committed notebook as it looks after an execution; what its outputs are does not matter here."""
    notebook = nbformat.read(notebooks_dir() / "02_baseline_inference.ipynb", as_version=4)
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count
        cell.outputs = [new_output("stream", name="stdout", text="an answer of runs/demo and https://example.org/usr/x\n")]
    return notebook


def written(notebook, folder):
    path = folder / "02_baseline_inference.ipynb"
    nbformat.write(notebook, path)
    return path


def the_parameters_cell(notebook):
    return next(cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))


def drop_outputs(notebook):
    for cell in code_cells(notebook):
        cell.outputs = []


def swap_order(notebook):
    cells = code_cells(notebook)
    cells[1].execution_count, cells[2].execution_count = 3, 2


def run_twice(notebook):
    for cell in code_cells(notebook):
        cell.execution_count += 7


def leave_one_out(notebook):
    code_cells(notebook)[3].execution_count = None


def add_output(text):
    return lambda notebook: code_cells(notebook)[4].outputs.append(new_output("stream", name="stdout", text=text))


def add_error(notebook):
    code_cells(notebook)[4].outputs.append(new_output("error", ename="ValueError", evalue="no", traceback=[]))


def second_parameters(notebook):
    code_cells(notebook)[3].metadata["tags"] = ["parameters"]


def no_parameters(notebook):
    the_parameters_cell(notebook).metadata["tags"] = []


def long_parameters(notebook):
    the_parameters_cell(notebook).source += "".join(f"\nA{i} = {i}" for i in range(8))


def long_cell(notebook):
    code_cells(notebook)[5].source = "\n".join(f"x = {i}" for i in range(21))


def no_marks(notebook):
    for cell in code_cells(notebook):
        cell.metadata["tags"] = [tag for tag in cell.metadata.get("tags", []) if tag != "nbval-check-output"]


BREAKS = {
    "no outputs": (drop_outputs, "has no outputs"),
    "wrong order": (swap_order, "not run in order"),
    "not from a fresh kernel": (run_twice, "not run in order"),
    "one cell not run": (leave_one_out, "not run in order"),
    "widgets": (lambda notebook: notebook.metadata.update(widgets={"state": {}}), "metadata.widgets is kept"),
    "no kernelspec": (lambda notebook: notebook.metadata.pop("kernelspec"), "kernelspec is not python3"),
    "another kernel": (lambda notebook: notebook.metadata.kernelspec.update(name="venv"), "kernelspec is not python3"),
    "home folder": (add_output(f"saved to {Path('/', 'home', 'ann', 'runs')}\n"), "absolute path (/home/a"),
    "temporary folder": (add_output("'/tmp/pytest-1/run'\n"), "absolute path (/tmp/p"),
    "Kaggle folder": (add_output("(/kaggle/working/runs)\n"), "absolute path (/kaggle/w"),
    "Hub token": (add_output("hf_" + "aB3" * 11), "looks like a secret"),
    "Weights & Biases key": (add_output("wandb login " + "0123456789" * 4), "looks like a secret"),
    "error output": (add_error, "shows an error"),
    "two parameters cells": (second_parameters, "needs one parameters cell"),
    "no parameters cell": (no_parameters, "needs one parameters cell"),
    "long parameters cell": (long_parameters, "needs one parameters cell"),
    "long cell": (long_cell, "have more than 15 lines"),
    "nothing marked": (no_marks, "marks no output for comparison"),
}


def test_an_executed_copy_has_no_fault(tmp_path):
    assert faults(written(executed(), tmp_path)) == []


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_copy_has_just_the_fault_that_was_put_in(broken, tmp_path):
    change, expected = BREAKS[broken]
    notebook = executed()
    change(notebook)
    found = faults(written(notebook, tmp_path))
    assert len(found) == 1 and expected in found[0], found


def test_a_cell_of_15_lines_is_not_too_long(tmp_path):
    notebook = executed()
    code_cells(notebook)[5].source = "\n".join(f"x = {i}" for i in range(15))
    assert faults(written(notebook, tmp_path)) == []


# --- cleaning ------------------------------------------------------------------------------------------------------


def cleaned(*outputs, **metadata):
    cell = new_code_cell("x", outputs=list(outputs), metadata={"tags": ["parameters"], **metadata})
    return clean(new_notebook(cells=[cell])).cells[0]


def test_cleaning_strips_widgets_and_times_but_keeps_tags():
    notebook = executed()
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    notebook.metadata["papermill"] = {"start_time": "2026-01-01"}
    notebook.metadata["language_info"]["version"] = "3.11.7"
    for cell in notebook.cells:
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    result = clean(notebook)
    assert set(result.metadata) == {"kernelspec", "language_info"}
    assert result.metadata["language_info"] == {"name": "python"}
    assert all(set(cell.metadata) <= {"tags", *setup_cell.COLLAPSED} for cell in result.cells)
    assert the_parameters_cell(result).metadata["tags"] == ["parameters"]
    assert result.metadata.kernelspec.name == "python3"


def test_a_progress_bar_keeps_its_last_state_in_one_stream():
    def stream(name, text):
        return new_output("stream", name=name, text=text)

    outputs = cleaned(
        stream("stderr", "answers:   0%|\ranswers:  50%|"),
        stream("stdout", "one\n"),
        stream("stderr", "\ranswers: 100%|#\n"),
        stream("stdout", "two\r\n"),
    ).outputs
    assert [(output.name, output.text) for output in outputs] == [("stderr", "answers: 100%|#\n"), ("stdout", "one\ntwo\n")]


def test_cleaning_keeps_a_figure_and_drops_an_empty_stream():
    figure = new_output("display_data", data={"image/png": "iVBO", "text/plain": "<Figure>"}, metadata={"needs": "nothing"})
    blank = new_output("stream", name="stderr", text="   \n")
    kept = cleaned(new_output("stream", name="stdout", text="a\n"), figure, blank).outputs
    assert [output.output_type for output in kept] == ["stream", "display_data"]
    assert kept[1].data == figure.data and kept[1].metadata == {}


def test_cleaning_takes_out_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "no-prefix-of-its-own")
    printed = [new_output("stream", name="stdout", text=text) for text in ("401 for no-prefix-", "of-its-own\n")]
    assert cleaned(*printed).outputs[0].text == "401 for **********\n"


# --- what is committed ---------------------------------------------------------------------------------------------


def test_the_committed_notebooks_have_no_fault():
    assert check() == []


def test_the_compared_setup_cell_starts_a_notebook():
    cells = {read_setup_cell(notebooks_dir() / f"{name}.ipynb") for name in STEPS}
    assert all("run_dir = start(RUN_DIR)" in cell for cell in cells)


def test_every_test_is_collected_by_a_make_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test: suite nbval\b", makefile, re.MULTILINE)
    all_but = r"^suite:.*\n\t\$\(PYTEST\) tests -m \"not session and not campaign\"\n\n"
    assert re.search(all_but, makefile, re.MULTILINE), "`make test` takes the whole folder but what has a target of its own"
    assert re.search(r"^sessions:.*\n\t\$\(PYTEST\) tests/sessions\n", makefile, re.MULTILINE)
    assert re.search(r"^campaign:.*\n.*\n.* tests/campaign\n", makefile, re.MULTILINE)
    assert re.search(r"^make test\nmake sessions$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    marked = [
        path for path in (ROOT / "tests").rglob("*.py") if re.search(r"mark\.(session|campaign)\b", path.read_text("utf-8"))
    ]
    assert marked == [], "a test belongs to such a target by its folder alone"
    pytest_command = re.search(r"^PYTEST := \$\(BIN\)/python -m pytest (.+)$", makefile, re.MULTILINE)[1]
    assert not re.search(r"(?:^| )-[mk] |--ignore|--deselect", pytest_command), "and selects nothing there"
    folders = [ROOT / name for name in ("tests", "medcot_utils", "notebooks", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    with_tests = [path for path in files if re.search(r"^\s*(?:async )?def test_", path.read_text(encoding="utf-8"), re.M)]
    assert len(with_tests) > 10
    uncollected = [path for path in with_tests if path.relative_to(ROOT).parts[0] != "tests" or not path.name.startswith("test_")]
    assert uncollected == []


@pytest.mark.parametrize("name", STEPS)
def test_a_notebook_styles_no_table_and_remarks_on_its_outputs(name):
    cells = nbformat.read(notebooks_dir() / f"{name}.ipynb", as_version=4).cells
    assert not [cell.source for cell in cells if cell.cell_type == "code" and ".style" in cell.source], "wrap_texts escapes"
    remarks = [cell for cell in cells if cell.cell_type == "markdown" and "**Notice:**" in cell.source]
    assert len(remarks) >= 2
    for index, cell in enumerate(cells):
        if cell.source.startswith("**Notice:**"):
            assert cells[index - 1].get("outputs") or cells[index - 1].source.startswith("*"), cell.source


def test_notebooks_that_answer_questions_ask_for_fast_answers():
    """Unsloth's patches allow no slots. With them set, notebook 07 failed after minutes of work, because it alone did not ask."""
    asking = set()
    for name in STEPS:
        source = "\n".join(cell.source for cell in code_cells(nbformat.read(notebooks_dir() / f"{name}.ipynb", as_version=4)))
        if re.search(r"\b(answer_questions|run_tasks|measure_merged)\(", source):
            asking.add(name)
            assert "get_engine(config.model, fast_answers=fast)" in source, name
    assert asking == {"02_baseline_inference", "06_comparison", "07_export"}
