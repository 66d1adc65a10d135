"""Cells of notebooks 05 and 06 after the expensive work, run without a model on what a run may hold."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from computed_once import statistics_computed_once, undrawn_figures
from made_up_runs import QUESTIONS, fill

from medcot_utils import evaluation, models, training
from medcot_utils.config import load_config
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.plain_text import say
from medcot_utils.run.directory import Run
from medcot_utils.series.notebook import finish, show_table, table, wrap_texts
from medcot_utils.series.runner import notebooks_dir

__all__ = ["statistics_computed_once", "undrawn_figures"]
SCORED = [question["id"] for question in QUESTIONS if question["scored"]]


def cells_from(notebook, heading):
    """The code of a notebook's cells from this heading on, without its end."""
    cells = nbformat.read(notebooks_dir() / f"{notebook}.ipynb", as_version=4).cells
    start = next(index for index, cell in enumerate(cells) if cell.source.startswith(heading))
    return [cell.source for cell in cells[start:] if cell.cell_type == "code" and not cell.source.startswith("finish(")]


def execute(sources, names):
    """Run cells as a kernel does, and return what each showed at its end, as text and as the HTML that a reader sees."""
    shown = []
    for source in sources:
        body = ast.parse(source).body
        last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), source[:60], "exec"), names)
        value = eval(compile(last, source[:60], "eval"), names) if last else None
        page = value._repr_html_() if hasattr(value, "_repr_html_") else ""
        shown.append(f"{value}\n{page}")
    return shown


def repeated(name):
    return {"train_id": "t9", "question_id": name, "train_question": "Which?", "exact": True}


# --- 06 --------------------------------------------------------------------------------------------------------------


def compared_in_06(tmp_path, apart, others, questions):
    run = fill(Run.create(tmp_path / "run", load_config("smoke")), map(repeated, apart), apart, questions=questions)
    if not others:
        for name in ("held_out_loss", "base_mcq", "tuned_mcq"):
            run.write(name, [])
    (run.path / "metrics.json").unlink()
    names = {"run": run, "config": run.config, "evaluation": evaluation, "models": models, "SHOW": 3, "seed": run.config.seed}
    names |= {"say": say, "questions": run.read("questions"), "tuned": run.read("tuned_answers"), "n_samples": 1}
    names["tuned_mcq"] = [record | {"question": f"Which {record['id']}?"} for record in run.read("tuned_mcq")]
    return run, execute(cells_from("06_comparison", "## 6.3"), names)


@pytest.mark.usefixtures("undrawn_figures")
@pytest.mark.parametrize(
    ("apart", "others", "none"),
    [((), True, 0), (SCORED, True, 3), (SCORED, False, 6)],  # form, answers, samples; loss, multiple choice, needed
    ids=["as usual", "every question set apart", "neither loss nor multiple choice"],
)
def test_notebook_06_records_and_shows_whatever_was_measured(tmp_path, apart, others, none):
    numbered = [question | {"specialty": 7 if question["scored"] else "the article's question"} for question in QUESTIONS]
    run, shown = compared_in_06(tmp_path, apart, others, numbered)
    measured = run.read("metrics")
    assert (measured["n_questions"], measured["n_contaminated"]) == (0, 4) if apart else (4, 0)
    assert ("eval_loss" in measured["metrics"]) is ("mcq_accuracy" in measured["metrics"]) is others
    assert run.require("report").exists() and len(measured["claims"]) == 8
    assert [text.startswith("none") for text in shown].count(True) == none, shown
    assert not [text for text in shown if text.startswith("Empty DataFrame")], "a table without a line says nothing"
    tables = [text for text in shown if METRICS["thinking_tokens"].label in text]
    assert len(tables) == (1 if apart else 2), "those set apart, or greedy and sampled answers, without forced closing too"


def test_notebook_06_records_the_metrics_before_it_shows_any():
    sources = cells_from("06_comparison", "## 6.3")
    recorded = next(
        index for index, source in enumerate(sources) if 'run.write("metrics"' in source or "run.write('metrics'" in source
    )
    assert not [source for source in sources[:recorded] if "_table(" in source or "figure" in source or "Markdown" in source]


# --- tables ----------------------------------------------------------------------------------------------------------

SCRIPT = "<script>ran()</script> BP <90, $5 or \x1b[2J"


@pytest.mark.parametrize("make", [lambda frame: frame, wrap_texts, lambda frame: wrap_texts(frame, precision=3, na_rep="none")])
def test_a_tables_texts_are_shown_as_they_are(make):
    import html

    frame = pd.DataFrame({SCRIPT: [SCRIPT, "b"]}, index=[f"{SCRIPT} too", "c"])
    page = show_table(make(frame))
    assert "<script" not in page and "\x1b" not in page
    seen = html.unescape(page.replace("<span>&#36;</span>", "$").replace("<span>&#92;</span>", "\\"))
    assert seen.count(SCRIPT.replace("\x1b", r"\x1b")) == 3, "in the cell, the column's head and the index"


def test_an_ordinary_table_has_the_texts_that_pandas_writes():
    frame = table({"rows": "BP <90 & more", "loss": "1.77 [1.70, 1.84]"})
    ours, theirs = (re.sub(' style="[^"]*"', "", page) for page in (show_table(frame), frame._repr_html_()))
    assert ours.replace("\N{NO-BREAK SPACE}", " ") == f"<div>\n{theirs}\n</div>"


def test_a_value_that_is_not_there_reads_none_in_lower_case():
    frame = table({"unsloth": None, "trl": "1.14.2"}, "version")
    assert frame["version"].to_dict() == {"unsloth": "none", "trl": "1.14.2"}


def test_a_notebooks_start_lets_every_table_be_shown_so(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    from medcot_utils.series import notebook

    shell = InteractiveShell.instance()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    notebook._show_tables()
    formatted, _ = shell.display_formatter.format(pd.DataFrame({"a": ["$5"]}))
    assert "<span>&#36;</span>5" in formatted["text/html"]
    InteractiveShell.clear_instance()


def test_a_notebooks_figure_has_an_alt_text(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib.figure import Figure

    from medcot_utils.plots import length_figure
    from medcot_utils.series import notebook

    shell = InteractiveShell.instance()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    notebook._show_figures()
    data, metadata = shell.display_formatter.format(length_figure([300, 310], 640))
    assert data["image/png"].startswith("iVBOR") and metadata["image/png"] == {
        "alt": "Length of the training rows: rows over tokens per row"
    }
    assert "image/png" not in shell.display_formatter.format(Figure())[0], "nothing is drawn in it"
    InteractiveShell.clear_instance()


def test_the_end_of_a_notebook_is_not_said_as_an_error(tmp_path, capsys):
    run = fill(Run.create(tmp_path / "run", load_config("smoke")))
    run.begin("04_lora_config")
    capsys.readouterr()
    sizes = finish(run, "04_lora_config")["size (kB)"]
    said = capsys.readouterr()
    assert said.out.startswith("04_lora_config: ") and "peak memory" in said.out and said.err == ""
    assert all(re.fullmatch(r"[\d,]+\.\d", size) for size in sizes)


# --- 05 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log", [[], [{"step": 6, "train_loss": 1.5}], [{"step": 2, "eval_loss": 2.0}], [{"step": 2, "loss": 2.0, "grad_norm": 1.0}]]
)
def test_notebook_05_saves_and_shows_whatever_was_logged(tmp_path, log):
    run = fill(Run.create(tmp_path / "run", load_config("smoke", ["tracking.backend=none"])))
    for name in ("adapter", "training_log", "held_out_loss"):
        manifest = run.manifest()
        del manifest["artifacts"][name]
        run._save(manifest)
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=log, global_step=6))
    done = {name: getattr(training, name) for name in training.__all__ if name != "train"}
    loss = [{"model": "base", "id": "h1", "nll": 20.0, "tokens": 10}]
    run.write("plan", run.read("plan") | {"plan_memory_mb": 100})
    names = {
        "run": run,
        "config": run.config,
        "table": table,
        "say": say,
        "training": SimpleNamespace(**done, train=lambda *given: trainer),
        "models": SimpleNamespace(row_losses=lambda *given: [loss[0] | {"model": "tuned"}], mean_loss=models.mean_loss),
        "few": range(1),
        "export": SimpleNamespace(save_adapter=lambda model, tokenizer, config, folder: (folder / "weights").write_text("x")),
        "display": lambda figure: None,
        "losses": loss,
        **dict.fromkeys(("make_trainer", "plans", "model", "tokenizer", "held_out_rows", "eval_batch")),
    }
    sources = cells_from("05_training", "## 5.5")
    shown = execute(sources, names)
    assert all(run.require(name).exists() for name in ("adapter", "training_log", "held_out_loss"))
    assert run.read("training_log") == log
    assert any(text.startswith("none: no step was logged") for text in shown) is (
        not any({"loss", "eval_loss"} & set(entry) for entry in log)
    )
    assert "save_adapter" in sources[0], "saved in the cell that trains, before anything is shown"
