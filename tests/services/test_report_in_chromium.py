"""The report in a real browser: it opens from a file without a complaint, filters and links work, model text stays text."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from medcot_utils.claims import judge
from medcot_utils.evaluation import compare
from medcot_utils.report import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"]

ATTACK = (
    """</script><script>document.title = "ran"</script><img src="nowhere" onerror="document.title = 'ran'">"""
    """<a href="javascript:document.title='ran'">\u2028"""
)
FILLER = "The patient is seen again after a week. " * 12
# id: specialty, question, the base model's thinking and answer, the tuned model's. The reasoning is closed where there is an
# answer; the further down the list, the less alike the two.
CASES = {
    "q0": ("cardiology", "Which valve is affected?", "I think of it.", "The mitral valve.", "A zebra? No.", "The mitral valve."),
    "q1": ("cardiology", "Which rhythm is it?", "Irregular.", "Atrial flutter, and rest.", "So.", "Atrial flutter and rest."),
    "q2": ("ear, nose & throat", 'What hurts in "Menière"?', "Hm, hm, hm.", "", "The ear.", "Nothing; he is dizzy."),
    "q3": ("neurology", "Where is the lesion?", "No idea at all.", "", "Still 12 + 13 = 25?", ""),
    "q4": ("neurology", f"What does this do: {ATTACK}", ATTACK, f"Mitral or not, {ATTACK}", "xyz", "7 other words: bdfgh jklmp."),
}
BOTH, NEITHER, GAINED = "both: reasons and answers", "both: does not", "base does not, tuned reasons and answers"


def record(case, thinking, answer):
    closed = bool(answer)
    lengths = {"thinking_tokens": 7, "answer_tokens": 5}
    texts = {"thinking": f"{thinking} {FILLER}", "answer": answer and f"{answer} {FILLER}"}
    return {"id": case, "sample": 0, "well_formed": closed, "finished": closed, **texts, **lengths}


@pytest.fixture
def page(run_factory, write_all):
    """The report of a run of five questions, whose artifacts are made up and written without a model."""
    run = write_all(run_factory())
    references = [f"Reference of {name}." for name in CASES]
    questions = [
        {"id": name, "scored": True, "specialty": case[0], "Question": case[1], "Complex_CoT": "", "Response": reference}
        for (name, case), reference in zip(CASES.items(), references, strict=True)
    ]
    base = [record(name, *case[2:4]) for name, case in CASES.items()]
    tuned = [record(name, *case[4:6]) for name, case in CASES.items()]
    losses = [
        {"model": label, "id": name, "nll": nll, "tokens": 10} for label, nll in (("base", 20), ("tuned", 15)) for name in CASES
    ]
    repeats = [{"train_id": "t1", "question_id": "q3", "train_question": ATTACK, "exact": True}]
    metrics = compare(base, tuned, references, losses, run.config.evaluation, 1)
    measured = {"n_questions": len(CASES), "metrics": metrics, "claims": judge(metrics), "notes": [ATTACK]}
    run.write("questions", questions)
    run.write("base_answers", base)
    run.write("tuned_answers", tuned)
    run.write("data_report", {"repeats": repeats, "repeats_dropped": True})
    run.write("plan", {"rows": 12, "effective_batch": 4, "steps": 6})
    run.write("training_log", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    run.write("metrics", measured | {"n_samples": 0, "sampled": None, "n_contaminated": 0, "contaminated": None})
    return build_report(run)


TOOLS = """
const field_ = name => document.getElementById(name);
function choose(values) {
  for (const name of ["words", "specialty", "outcome", "order"]) {
    field_(name).value = values[name] || "";
    field_(name).dispatchEvent(new Event("input", {bubbles: true}));
  }
}
const seen = () => [...document.querySelectorAll("article")].filter(card => card.offsetParent !== null).map(card => card.id);
function report(result) {
  const place = document.createElement("pre");
  place.id = "result";
  place.textContent = JSON.stringify(result);
  document.body.append(place);
}
"""


def browse(folder: Path, page: str, script: str = "report(null)", fragment: str = "", *flags: str):
    """(what the script reported, complaints on the console, the title) of a page opened from a file, `script` added to it."""
    file = folder / "report.html"
    head, end = page.rsplit("</body>", 1)
    file.write_text(f"{head}<script>{TOOLS}{script}</script></body>{end}", encoding="utf-8")
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])) if found else None, console, html.unescape(title[1])


def test_the_report_opens_from_a_file_without_a_complaint(page, tmp_path):
    shown, console, title = browse(tmp_path, page, 'report([seen(), field_("count").textContent])')
    assert shown == [list(CASES), "5 of 5 questions"]
    assert console == [] and title == "medcot: base and tuned"
    assert browse(tmp_path, page, "missing()")[1], "a script that fails is a complaint"


def test_text_of_a_model_does_not_run_and_is_shown_as_it_was_written(page, tmp_path):
    script = """
      const card = field_("q4");
      for (const link of card.querySelectorAll("a")) link.click();
      setTimeout(() => report([
        document.scripts.length, document.images.length, card.querySelectorAll("a, img, script").length,
        [...card.querySelectorAll(".answer")].map(answer => answer.textContent)]), 500);
    """
    (scripts, images, elements, texts), console, title = browse(tmp_path, page, script)
    assert title == "medcot: base and tuned" and console == []
    assert (scripts, images, elements) == (2, 2, 1), "the page's script and this test's, the two figures, the question's link"
    assert texts[:2] == [f"{ATTACK} {FILLER}", f"Mitral or not, {ATTACK} {FILLER}"]
    # The same text unescaped does run: the test could see it.
    assert browse(tmp_path, page.replace("<h1>", f"{ATTACK}<h1>"), "setTimeout(() => report(1), 500)")[2] == "ran"


FILTERED = [
    ({}, ["q0", "q1", "q2", "q3", "q4"]),
    ({"words": "MITRAL"}, ["q0", "q4"]),
    ({"words": "  rest   atrial "}, ["q1"]),
    ({"words": "zebra"}, ["q0"]),
    ({"words": "reference of q3"}, ["q3"]),
    ({"words": "menière"}, ["q2"]),
    ({"words": "</script><script>"}, ["q4"]),
    ({"words": "mitral atrial"}, []),
    ({"specialty": "cardiology"}, ["q0", "q1"]),
    ({"specialty": "ear, nose & throat"}, ["q2"]),
    ({"outcome": BOTH}, ["q0", "q1", "q4"]),
    ({"outcome": NEITHER}, ["q3"]),
    ({"outcome": GAINED}, ["q2"]),
    ({"specialty": "neurology", "outcome": BOTH}, ["q4"]),
    ({"specialty": "neurology", "words": "mitral", "outcome": BOTH}, ["q4"]),
    ({"specialty": "cardiology", "words": "lesion"}, []),
    ({"order": "apart"}, ["q4", "q3", "q2", "q1", "q0"]),
    ({"order": "apart", "words": "mitral"}, ["q4", "q0"]),
    ({}, ["q0", "q1", "q2", "q3", "q4"]),
]


def test_words_specialty_outcome_and_order_filter_the_questions(page, tmp_path):
    chosen = json.dumps([values for values, _ in FILTERED]).replace("</", "<\\/")
    script = f'report({chosen}.map(values => {{ choose(values); return [seen(), field_("count").textContent]; }}))'
    shown, console, _ = browse(tmp_path, page, script)
    for (values, expected), (cards, count) in zip(FILTERED, shown, strict=True):
        assert (values, cards, count) == (values, expected, f"{len(expected)} of 5 questions")
    assert console == []


def test_enter_in_the_search_field_does_not_leave_the_page(page, tmp_path):
    script = """
      choose({words: "mitral"});
      field_("filters").requestSubmit();
      setTimeout(() => report([location.search, seen()]), 500);
    """
    assert browse(tmp_path, page, script)[0] == ["", ["q0", "q4"]]


# Where the question's own link is on the screen, and whose element lies on top there.
WHERE = """
  const link = field_("q3").querySelector("a.tag").getBoundingClientRect();
  const on_top = document.elementFromPoint(link.x + link.width / 2, link.y + link.height / 2);
  report([document.querySelector(":target")?.id, link.y >= 0 && link.y < innerHeight, on_top?.closest("article")?.id]);
"""


def test_a_link_to_a_question_opens_the_report_there(page, tmp_path):
    target, on_screen, _ = browse(tmp_path, page, f"setTimeout(() => {{ {WHERE} }}, 1000)", "#q3")[0]
    assert (target, on_screen) == ("q3", True)
    assert browse(tmp_path, page, f"setTimeout(() => {{ {WHERE} }}, 1000)")[0][:2] == [None, False], "it is not there by itself"


def test_the_question_that_a_link_leads_to_is_not_covered_by_the_filters(page, tmp_path):
    assert browse(tmp_path, page, f"setTimeout(() => {{ {WHERE} }}, 1000)", "#q3")[0] == ["q3", True, "q3"]


def test_a_link_within_the_page_leads_to_its_question(page, tmp_path):
    script = f"""document.querySelector('ul a[href="#q3"]').click(); setTimeout(() => {{ {WHERE} }}, 1000)"""
    assert browse(tmp_path, page, script)[0][:2] == ["q3", True]


def test_the_question_that_a_link_leads_to_is_marked_in_the_light_and_in_the_dark(page, tmp_path):
    script = """setTimeout(() => report([matchMedia("(prefers-color-scheme: dark)").matches,
      getComputedStyle(document.querySelector(":target")).outlineColor, getComputedStyle(document.body).color]), 500)"""
    light, dark = (
        browse(tmp_path, page, script, "#q3", f"--blink-settings=preferredColorScheme={scheme}")[0] for scheme in (1, 0)
    )
    assert light == [False, "rgb(0, 114, 178)", "rgb(0, 0, 0)"]
    assert dark == [True, "rgb(108, 184, 230)", "rgb(255, 255, 255)"]


def test_nothing_is_wider_than_a_telephone(page, tmp_path):
    # Chromium opens no window as narrow as that, so the page stands in a frame and tells its parent.
    tell = "onload = () => parent.postMessage([innerWidth, document.documentElement.scrollWidth], '*')"
    (tmp_path / "inner.html").write_text(page.replace("</body>", f"<script>{tell}</script></body>"), encoding="utf-8")
    outer = '<title>outer</title><body><iframe src="inner.html" width="390" height="844" style="border: 0"></iframe></body>'
    (inner_width, scroll_width), _, _ = browse(tmp_path, outer, "onmessage = event => report(event.data)")
    assert inner_width == 390 and scroll_width <= inner_width
