"""The report in a real browser: it opens from a file without a complaint, filters and links work, model text stays text."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import pytest
from browsers import CHROMIUM, needs_chromium

from medcot_utils.evaluation import build_report, compare, judge, score

pytestmark = needs_chromium

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
    texts["completion"] = "\n</think>\n".join(filter(None, texts.values()))
    return {"id": case, "sample": 0, "closed": int(closed), "well_formed": closed, "finished": closed, **texts, **lengths}


@pytest.fixture
def run(run_factory, write_all):
    """A run of five questions, whose artifacts are made up and written without a model."""
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
    scored = score(questions, base, tuned, {"repeats": [], "repeats_dropped": True})
    metrics = compare(scored.counted, losses, run.config.evaluation, 1)
    measured = {"n_questions": len(CASES), "metrics": metrics, "claims": judge(metrics, metrics, {}), "notes": [ATTACK]}
    run.write("questions", questions)
    run.write("base_answers", base)
    run.write("held_out_loss", losses)
    run.write("tuned_answers", tuned)
    run.write("data_report", {"repeats": repeats, "repeats_dropped": True})
    run.write("plan", {"rows": 12, "effective_batch": 4, "steps": 6})
    run.write("training_log", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    measured |= {"n_samples": 0, "sampled": None, "n_answered": len(CASES), "answered": metrics}
    run.write("metrics", measured | {"n_contaminated": 0, "contaminated": None})
    return run


@pytest.fixture(scope="module")
def pages():
    return {}


@pytest.fixture
def page(pages, request):
    """The report of `run`, made once: no test changes its text."""
    if not pages:
        pages["page"] = build_report(request.getfixturevalue("run"))
    return pages["page"]


TOOLS = """
const field_ = name => document.getElementById(name);
function choose(values) {
  for (const name of ["words", "specialty", "outcome", "disagreement", "order"]) {
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


def test_model_text_is_shown_verbatim_and_never_executed(page, tmp_path):
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
    assert texts[:2] == [f"{ATTACK} {FILLER}".strip(), f"Mitral or not, {ATTACK} {FILLER}".strip()]
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
    ({"disagreement": "outcomes"}, ["q2"]),
    ({"disagreement": "outcomes", "specialty": "cardiology"}, []),
    ({"disagreement": "0.8"}, []),
    ({"order": "apart"}, ["q4", "q3", "q2", "q1", "q0"]),
    ({"order": "apart", "words": "mitral"}, ["q4", "q0"]),
    ({}, ["q0", "q1", "q2", "q3", "q4"]),
]


def require_filtered(folder, page, filtered):
    chosen = json.dumps([values for values, _ in filtered]).replace("</", "<\\/")
    script = f'report({chosen}.map(values => {{ choose(values); return [seen(), field_("count").textContent]; }}))'
    shown, console, _ = browse(folder, page, script)
    for (values, expected), (cards, count) in zip(filtered, shown, strict=True):
        assert (values, cards, count) == (values, expected, f"{len(expected)} of 5 questions")
    assert console == []


def test_every_filter_and_the_order_select_the_right_questions(page, tmp_path):
    require_filtered(tmp_path, page, FILTERED)


def test_questions_whose_answers_lie_far_apart_can_be_chosen(page, tmp_path):
    for question, apart in {"q0": "1.0", "q1": "0.8", "q2": "0.799", "q3": "0.5", "q4": "0.499"}.items():
        page, changed = re.subn(rf'(<article id="{question}"[^>]* data-apart=")[^"]*', rf"\g<1>{apart}", page)
        assert changed == 1
    chosen = [
        ({"disagreement": "0.5"}, ["q0", "q1", "q2", "q3"]),
        ({"disagreement": "0.8"}, ["q0", "q1"]),
        ({"disagreement": "0.5", "specialty": "neurology"}, ["q3"]),
        ({"disagreement": "0.5", "outcome": BOTH, "words": "mitral"}, ["q0"]),
        ({"disagreement": "0.5", "outcome": NEITHER, "words": "mitral"}, []),
        ({"disagreement": "0.5", "order": "apart", "outcome": BOTH}, ["q0", "q1"]),
        ({"disagreement": "outcomes"}, ["q2"]),
    ]
    require_filtered(tmp_path, page, chosen)


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


def test_the_filters_do_not_cover_a_linked_question(page, tmp_path):
    assert browse(tmp_path, page, f"setTimeout(() => {{ {WHERE} }}, 1000)", "#q3")[0] == ["q3", True, "q3"]


def test_a_link_within_the_page_leads_to_its_question(page, tmp_path):
    script = f"""document.querySelector('ul a[href="#q3"]').click(); setTimeout(() => {{ {WHERE} }}, 1000)"""
    assert browse(tmp_path, page, script)[0][:2] == ["q3", True]


HIDE = 'choose({words: "mitral", specialty: "cardiology", outcome: "both: reasons and answers", disagreement: "outcomes"});'
STATE = '[...seen(), field_("count").textContent, field_("words").value, field_("disagreement").value]'
ALL = [*CASES, "5 of 5 questions", "", ""]


@pytest.mark.parametrize(
    ("fragment", "then"),
    [
        ("#q3", ""),
        ("", 'location.hash = "#q3";'),
        ("", """document.querySelector('ul a[href="#q3"]').click();"""),
        # The same link a second time changes no address.
        ("", """location.hash = "#q3"; await wait(300); HIDE document.querySelector('ul a[href="#q3"]').click();"""),
    ],
    ids=["opened", "address", "link", "link again"],
)
def test_a_link_to_a_hidden_question_clears_the_filters(page, tmp_path, fragment, then):
    script = f"""
      const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
      async function go() {{
        {HIDE}
        const before = seen();
        {then.replace("HIDE", HIDE)}
        await wait(1000);
        const state = {STATE};
        {WHERE.replace("report([", "report([before, state, ")}
      }}
      go();
    """
    before, state, target, on_screen, on_top = browse(tmp_path, page, script, fragment)[0]
    assert before == [] and state == ALL
    assert (target, on_screen, on_top) == ("q3", True, "q3")


def test_a_link_to_a_shown_question_keeps_the_filters(page, tmp_path):
    script = f"""choose({{specialty: "neurology"}}); location.hash = "#q3"; setTimeout(() => report({STATE}), 1000)"""
    assert browse(tmp_path, page, script)[0][:3] == ["q3", "q4", "2 of 5 questions"]


# The print rules as the browser applies them: made to hold on the screen.
PRINTED = """
  const rules = [...document.styleSheets].flatMap(sheet => [...sheet.cssRules]).filter(rule => rule.media);
  const print = rules.filter(rule => rule.media.mediaText === "print");
  for (const rule of print) rule.media.mediaText = "all";
  const visible = chosen => [...document.querySelectorAll(chosen)].map(one => one.checkVisibility());
  const tables = [...document.querySelectorAll("details table")].filter(table => table.checkVisibility());
"""


def test_print_shows_everything_but_the_folded_thinking(page, run, tmp_path):
    measured = run.read("metrics")
    more = {"n_samples": 2, "sampled": measured["metrics"], "n_contaminated": 2, "contaminated": measured["metrics"]}
    run.write("metrics", measured | more)
    script = f"""{PRINTED}
      document.querySelector("#q1 details").open = true;
      report([print.length, tables.map(table => table.closest("details").firstChild.textContent.split(",")[0]),
        visible("article"), visible(".pair > section > .answer"), visible("#q1 details .answer"), visible("form")])"""
    rules, tables, cards, answers, thinking, form = browse(tmp_path, build_report(run), script)[0]
    assert rules == 1
    assert tables == ["greedy answers", "sampled answers", "greedy answers", "2 questions that training rows repeat"]
    assert cards == [True] * 5 and answers == [True] * 10
    assert thinking == [True, False] and form == [False]


def test_a_linked_question_is_marked_in_light_and_dark_mode(page, tmp_path):
    script = """setTimeout(() => report([matchMedia("(prefers-color-scheme: dark)").matches,
      getComputedStyle(document.querySelector(":target")).outlineColor, getComputedStyle(document.body).color]), 500)"""
    light, dark = (
        browse(tmp_path, page, script, "#q3", f"--blink-settings=preferredColorScheme={scheme}")[0] for scheme in (1, 0)
    )
    assert light == [False, "rgb(0, 114, 178)", "rgb(0, 0, 0)"]
    assert dark == [True, "rgb(108, 184, 230)", "rgb(255, 255, 255)"]


def on_a_telephone(folder, page, tell, fragment=""):
    """What `tell`, an expression, is a second after the page was opened on a telephone."""
    # Chromium opens no window as narrow as that, so the page stands in a frame and tells its parent.
    tell = f"onload = () => setTimeout(() => parent.postMessage({tell}, '*'), 1000)"
    (folder / "inner.html").write_text(page.replace("</body>", f"<script>{tell}</script></body>"), encoding="utf-8")
    frame = f'<iframe src="inner.html{fragment}" width="390" height="844" style="border: 0"></iframe>'
    return browse(folder, f"<title>outer</title><body>{frame}</body>", "onmessage = event => report(event.data)")[0]


def test_on_a_telephone_a_linked_question_is_not_covered(page, tmp_path):
    place = """(() => {
      const card = document.querySelector(":target").getBoundingClientRect();
      const over = document.elementFromPoint(card.x + card.width / 2, card.y + 3);
      return [card.y >= 0 && card.y < 100, over.closest("article")?.id];
    })()"""
    assert on_a_telephone(tmp_path, page, place, "#q3") == [True, "q3"]
    sticky = page.replace("</style>", "form { position: sticky; top: 0; z-index: 1; }</style>")
    assert on_a_telephone(tmp_path, sticky, place, "#q3") == [True, None], "the test could see it"
