"""The tables of the notebooks in a browser: on a page of 800 pixels, with its margin for the prompts, none has to be scrolled."""

from __future__ import annotations

import contextlib
import json

import pandas as pd
import pytest
from browsers import Browser, needs_chromium

from medcot_utils import evaluation
from medcot_utils.config import load_config, setting_names
from medcot_utils.machine.paths import HOME
from medcot_utils.series.notebook import show_table, wrap_texts

pytestmark = needs_chromium

ROOM = 656  # pixels beside the prompts, in JupyterLab on a page of 800
STYLE = f"body {{ font: 13px DejaVu Sans, sans-serif; width: {ROOM}px }} th, td {{ padding: 6px }} table {{ border-spacing: 0 }}"
SCROLLING = "[...document.querySelectorAll('body > div')].filter(box => box.scrollWidth > box.clientWidth).map(box => box.id)"


def tables():
    """{cell of a notebook: the HTML of its table}, with the numbers of docs/demo.json."""
    demo = json.loads((HOME / "docs" / "demo.json").read_text(encoding="utf-8"))
    measured, names = demo["metrics"], setting_names()
    config, article = load_config("demo"), load_config("article")
    settings = pd.DataFrame({"this run": str(config.get(name)), "the article": str(article.get(name))} for name in names)
    pairs = [("merged", "4-bit base + adapter", 0.00215, 0.03203, 3, 3)]
    columns = ["a", "b", "mean_logprob_difference", "max_logprob_difference", "same_greedy", "prompts"]
    published = evaluation.mcq.published_scores([], []).dropna(axis="columns", how="all")
    frames = {
        "01 settings": settings.set_index(pd.Index(names, name="setting")),
        "06 greedy answers": evaluation.metrics_table(measured["metrics"], measured["forced"]),
        "06 sampled answers": evaluation.metrics_table(measured["sampled"], measured["sampled_forced"]),
        "06 multiple choice": evaluation.mcq.readings_table(measured["mcq_readings"]),
        "06 published scores": wrap_texts(published, precision=3, na_rep="not reported"),
        "06 claims": evaluation.claims_table(measured["claims"]),
        "06 needed": evaluation.needed_table(measured["metrics"] | measured["forced"], 0.95),
        "07 pairs": pd.DataFrame(pairs, columns=columns).set_index(["a", "b"]),
        "07 merged": evaluation.merged_table(demo["merged"]),
    }
    with pd.option_context("display.max_colwidth", 200):
        return {name: show_table(frame) for name, frame in frames.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("browser") / "profile")) as browser:
        yield browser


def test_no_table_of_a_notebook_is_wider_than_its_page(browser, tmp_path):
    shown = {name: page.replace("<div style=", f'<div id="{name}" style=', 1) for name, page in tables().items()}
    page = tmp_path / "tables.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(shown.values())}", encoding="utf-8")
    browser.show_as(800, "light")
    browser.call("Page.navigate", url=page.as_uri())
    browser.until(f"document.readyState === 'complete' && document.querySelectorAll('body > div').length === {len(shown)}")
    assert browser.js(SCROLLING) == []
    browser.js("document.body.style.width = '200px'")
    assert len(browser.js(SCROLLING)) == len(shown), "the test could see it"
