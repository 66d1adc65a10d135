"""A run that somebody else made, with a text in every field that tries to be more than text, in every place that shows a run:
nothing of it runs, commands the terminal or turns the lines, and a reader sees it as it was typed."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browsers import Browser, needs_chromium
from computed_once import remembering
from grading_server import serving as serving_grading
from planted_texts import PAYLOADS, found_in, mark, planted_run, shown

from medcot_utils.cli import main
from medcot_utils.run.directory import Run

TESTS = Path(__file__).parents[1]
# What a page holds that came out of a text: elements, handlers, addresses; and what MathJax would take for a formula.
LOOK = """(() => {
  const body = document.body.cloneNode(true), formulas = [];
  for (const own of body.querySelectorAll("script, style")) own.remove();
  const all = [...body.querySelectorAll("*")];
  const texts = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const {data, parentElement} = texts.currentNode;
    if (/[$\\\\]./.test(data) && !parentElement.closest("pre, code, textarea")) formulas.push(data);
  }
  return {
    title: document.title,
    text: body.textContent,
    planted: [
      ...all.filter(one => [...one.attributes].some(a => /^(on|srcdoc|autofocus)/.test(a.name))).map(one => one.outerHTML),
      ...all.map(one => one.getAttribute("href") || one.getAttribute("src")).filter(to => /^[^#]*(javascript:|nowhere)/.test(to)),
    ],
    formulas,
  };
})()"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A planted run for each payload, by its name."""
    import matplotlib.figure
    import scipy.stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy.stats, "binomtest", remembering(scipy.stats.binomtest))
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, target, **options: target.write(b"\x89PNG not drawn"))
        yield {name: planted_run(tmp_path_factory.mktemp("planted") / "run", name) for name in PAYLOADS}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium") / "profile")) as browser:
        yield browser


def look_at(browser, folder, page, name):
    """What a page shows in Chromium, after checking that nothing of a text became a part of it."""
    file = folder / f"{name}.html"
    file.write_text(page, encoding="utf-8", errors="surrogatepass")
    browser.call("Page.navigate", url=file.as_uri())
    browser.until("document.readyState === 'complete'")
    seen = browser.js(LOOK)
    assert seen["title"] != "ran"
    assert seen["planted"] == []
    return seen


def require_as_typed(text, expected, at_least):
    """Every payload in a text is shown as it should be; there are some, so that this can fail."""
    found, typed = found_in(text), {" ".join(one.split()) for one in expected}
    assert [one for one in found if one not in typed] == []
    assert len(found) >= at_least, f"{len(found)} texts in:\n{text}"


# --- the terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def medcot(monkeypatch, capfd):
    """`medcot("status", …)`: what the command prints on both streams, on a terminal with colors."""
    monkeypatch.setattr(main.console, "width", 5000)
    monkeypatch.setattr(main.console, "_force_terminal", True)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["medcot", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main.main()
        said = capfd.readouterr()
        return said.out + said.err

    return call


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_terminal_shows_every_text_and_obeys_none(runs, medcot, name):
    run = runs[name]
    said = medcot("status", run.path)
    require_as_typed(said, [shown(name)], at_least=5)
    said += (error := medcot("run", "--run-dir", run.path))
    assert re.search("training.optim: unknown .adamw_torch«", error) and error.count("\n") == 1
    own = re.sub(r"\x1b\[[\d;]*m", "", said)  # colors
    assert re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", own) == []


@pytest.mark.parametrize("name", PAYLOADS)
def test_chat_streams_a_text_in_pieces_and_obeys_none(name, capfd):
    from medcot_utils.cli.chat import Terminal
    from medcot_utils.models.chat import grow_answer

    class Parrot:
        def stream(self, question, who, stop):
            return grow_answer([mark(name), "</think>", *mark(name)])

    Terminal(Parrot(), False, ["?"]).talk()
    require_as_typed(capfd.readouterr().out, [shown(name)], at_least=1)


# --- pages -----------------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("name", PAYLOADS)
def test_the_report_shows_every_text_as_it_was_typed(runs, browser, medcot, tmp_path, name):
    run, file = runs[name].path, tmp_path / "report.html"
    assert medcot("report", run, run, "--out", file).endswith(" MB)\n")  # each run, beside the other
    seen = look_at(browser, tmp_path, file.read_text(encoding="utf-8"), name)
    require_as_typed(seen["text"], [shown(name)], at_least=120)


@needs_chromium
@pytest.mark.parametrize("name", PAYLOADS)
def test_the_model_card_shows_every_text_as_it_was_typed(runs, browser, tmp_path, name):
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    from medcot_utils.export.model_card import model_card

    card = ModelCard(model_card(runs[name]))
    # As Jupyter and GitHub read Markdown, before either cleans the HTML.
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(card.text)
    seen = look_at(browser, tmp_path, f"<title>card</title><body>{page}</body>", name)
    require_as_typed(seen["text"], [shown(name)], at_least=15)
    assert seen["formulas"] == []


def show_as_notebooks_do(run):
    """What the notebooks show of a run: (tables as HTML, lines as printed)."""
    import pandas as pd

    from medcot_utils import data, evaluation, models, training
    from medcot_utils.plain_text import say
    from medcot_utils.series.notebook import show_table, table, wrap_texts

    measured, merged, check, questions = map(run.read, ("metrics", "merged_metrics", "export_check", "questions"))
    mcq = {side: run.read(f"{side}_mcq") * 3 for side in ("base", "tuned")}
    answers = {side: [models.show_text(one) for one in run.read(f"{side}_answers")[:5]] for side in ("base", "tuned")}
    texts = pd.DataFrame({"question": [question["Question"] for question in questions]} | answers)
    named = texts.set_index("question").rename(columns={"base": answers["base"][0]})
    frames = [
        evaluation.claims_table(measured["claims"]),
        evaluation.mcq.readings_table(measured["mcq_readings"]),
        evaluation.mcq.specialty_table(*mcq.values()),
        evaluation.merged_verdicts_table(merged),
        data.tabulate_repeats(run.read("data_report")["repeats"], questions),
        table(evaluation.mcq.overview(mcq["base"])),
        table(run.config.get("model")),
        pd.DataFrame(questions).set_index("id")[["specialty", "Question"]],
        pd.DataFrame(check["pairs"]).set_index(["a", "b"]).round(5),
        pd.DataFrame(check["files"]).set_index("file"),
        wrap_texts(texts),
        wrap_texts(named, precision=3, na_rep="not reported"),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        say(training.describe_tracking(run), merged["summary"], *run.why_stale("05_training"))
        print(*answers["tuned"], sep="\n")
    with pd.option_context("display.max_colwidth", None):
        return [show_table(frame) for frame in frames], said.getvalue()


@needs_chromium
def test_a_published_notebook_shows_every_text_as_it_was_typed(runs, browser, tmp_path):
    import nbformat.v4 as nbformat
    from nbconvert import HTMLExporter

    cells = []
    for run in runs.values():
        tables, said = show_as_notebooks_do(run)
        outputs = [nbformat.new_output("display_data", {"text/html": page}) for page in tables]
        cells.append(nbformat.new_code_cell("", outputs=[*outputs, nbformat.new_output("stream", name="stdout", text=said)]))
    page, _ = HTMLExporter(mathjax_url="").from_notebook_node(nbformat.new_notebook(cells=cells))
    seen = look_at(browser, tmp_path, page, "notebook")
    require_as_typed(seen["text"], map(shown, PAYLOADS), at_least=60 * len(PAYLOADS))
    assert seen["formulas"] == []


@needs_chromium
def test_the_grading_page_shows_every_text_as_it_was_typed(runs, browser, tmp_path):
    run = runs["typed"]
    texts = "\n".join(map(mark, PAYLOADS))
    planted = Run.open(run.path)
    for artifact in ("questions", "base_answers", "tuned_answers"):
        text = {"specialty": texts, "Question": texts, "Response": texts, "thinking": texts, "answer": texts}
        planted.write(artifact, [one | {key: text[key] for key in text.keys() & one.keys()} for one in run.read(artifact)])
    with serving_grading(planted) as server:
        browser.call("Page.navigate", url=server.address)
        browser.until("document.body && document.body.innerText.includes('Question 1 of')")
        for label in ("Thinking of A", "Thinking of B", "Show the reference"):
            browser.press(label)
        browser.until("document.body.textContent.includes('Reference response')")
        seen = browser.js(LOOK)
    assert seen["title"] == "Blind grading" and seen["planted"] == []
    require_as_typed(seen["text"], map(shown, PAYLOADS), at_least=7 * len(PAYLOADS))


CHAT = """
import sys
from pathlib import Path
from planted_texts import PAYLOADS, mark
from medcot_utils.cli import chat_page, web
from medcot_utils.models.chat import Answer, ChatError
texts = "\\n".join(map(mark, PAYLOADS))
class Parrot:
    most_tokens = 192
    def stream(self, question, who, stop=None):
        if question == "error":
            raise ChatError(f"too long: {texts}")
        yield Answer(texts, texts, 1.0, True)
web.serve(chat_page.build_page(Parrot(), True), web.listen(0, ChatError), "chat page", chat_page.CSS, Path(sys.argv[1]), False)
"""


@needs_chromium
def test_the_chat_page_shows_every_text_as_it_was_typed(browser, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(TESTS / 'unit')!r})\n{CHAT}", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://\S+", process.stdout.readline())[0]
            browser.call("Page.navigate", url=address)
            for question, answered in (("tell", "thinking: "), ("error", "too long")):
                for _ in range(20):  # a text typed before the page listens is lost
                    browser.js("(box => { box.value = ''; box.focus(); })(document.querySelector('textarea'))")
                    browser.call("Input.insertText", text=question)
                    browser.press("Ask")
                    time.sleep(1)
                    if answered in browser.text():
                        break
                browser.until(f"document.body.textContent.includes({answered!r})")
                seen = browser.js(LOOK)
                assert seen["title"] == "medcot chat" and seen["planted"] == []
                require_as_typed(seen["text"], map(shown, PAYLOADS), at_least=len(PAYLOADS))
        finally:
            process.kill()
