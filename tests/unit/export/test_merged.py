"""What leaves a run as pages: the report and the model card."""

from __future__ import annotations

import html
import re

import pytest
from made_up_runs import ATTACK, CONFIG, QUESTIONS, Tags, fill

from medcot_utils.config import load_config
from medcot_utils.evaluation.comparison import format_side, verdict
from medcot_utils.evaluation.intervals import format_interval
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.evaluation.report import build_report
from medcot_utils.export.model_card import model_card
from medcot_utils.plain_text import keep_intervals
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import RunError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fill(Run.create(tmp_path_factory.mktemp("report") / "run", CONFIG))


# --- report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(run):
    return build_report(run)


def test_model_text_is_escaped_in_the_report(page):
    seen = Tags(page)
    assert seen.text.count(ATTACK) == len(QUESTIONS), "the reader sees the answer as the model wrote it"
    assert seen.tags.count("script") == 1 and page.count("<script") == page.count("</script") == 1, "the page's own"
    assert "alert" not in seen.scripts and 'field("filters")' in seen.scripts
    assert seen.tags.count("img") == 2, "the two figures, and no picture out of an answer"
    assert "Which valve, 0 < 9?" in seen.text


def test_every_text_that_comes_from_a_file_is_escaped(tmp_path):
    hostile = [question | dict.fromkeys(("specialty", "Question", "Response"), ATTACK) for question in QUESTIONS]
    hostile[1] = hostile[1] | {"id": f'q0" onclick="{ATTACK}'}
    repeat = {"train_id": ATTACK, "question_id": hostile[1]["id"], "similarity": 91.5, "overlap": 0.5, "exact": False}
    given = {"questions": hostile, "base": (ATTACK, True), "thinking": ATTACK, "notes": [ATTACK]}
    page = build_report(fill(Run.create(tmp_path / "run", CONFIG), [repeat | {"train_question": ATTACK}], **given))
    seen = Tags(page)
    assert seen.tags.count("script") == 1 and page.count("</script") == 1 and "alert" not in seen.scripts
    assert seen.tags.count("img") == 2 and not [name for name in seen.attributes if name.startswith("on")]
    # Of each question: specialty, question, reference, two answers and two thinkings; one id, shown as its link; a choice of
    # specialty; a note, and the repeat's two texts and its link.
    assert seen.text.count(ATTACK) == 7 * len(QUESTIONS) + 1 + 1 + 1 + 3
    assert seen.options["specialty"] == ["every specialty", ATTACK]


def test_the_report_opens_without_a_network(page):
    seen = Tags(page)
    assert len(seen.addresses) >= 2 + len(QUESTIONS)
    assert [a for a in seen.addresses if not a.startswith(("data:image/png;base64,", "#"))] == []
    assert re.findall(r"(?:url\(|@import)\s*[\"']?[^\s)]{0,40}", page) == []
    assert re.findall(r"fetch|XMLHttpRequest|WebSocket|import", Tags(page).scripts) == []


def test_the_report_shows_every_metric_and_every_question(page, run):
    seen, measured = Tags(page), run.read("metrics")
    assert {"eval_loss", "repetition", "chrf", "mcq_accuracy"} <= set(measured["metrics"])
    for name, metric in (*measured["metrics"].items(), *measured["sampled"].items()):
        assert METRICS[name].text in seen.text
        assert keep_intervals(format_interval(metric["difference"])) in seen.text and verdict(name, metric) in seen.text
    assert all(page.count(f'<article id="{question["id"]}"') == 1 for question in QUESTIONS)
    assert seen.text.count("shown, not scored") == 1
    assert "No training row repeats an evaluation question" in seen.text


def test_the_report_shows_every_claim_with_its_test_and_verdict(page, run):
    seen, claims = Tags(page), run.read("metrics")["claims"]
    assert len(claims) >= 8 and any(claim["verdict"].startswith("holds") for claim in claims)
    for claim in claims:
        cells = keep_intervals("</td><td>".join(claim[key] for key in ("claim", "tested_by", "result")))
        assert cells in html.unescape(re.sub("<td [^>]*>", "<td>", page)) and claim["verdict"] in seen.text


def test_every_question_links_to_itself_and_no_link_is_broken(page):
    seen = Tags(page)
    inner = [address[1:] for address in seen.addresses if address.startswith("#")]
    assert sorted(inner) == sorted(question["id"] for question in QUESTIONS)
    assert set(inner) <= set(seen.ids) and len(seen.ids) == len(set(seen.ids))


def test_marks_say_where_an_answer_differs_from_the_first_models(page):
    seen = Tags(page).text
    assert seen.count("does not close the tag properly; cut off") == len(QUESTIONS), "the base model's answers"
    assert seen.count("times the words") == len(QUESTIONS), "the tuned ones are longer"
    assert "base does not, tuned reasons and answers" in seen and seen.count("(no answer after its thinking)") == len(QUESTIONS)


def test_sampled_and_set_apart_questions_have_their_own_tables(tmp_path, run, page):
    plain = Tags(page).text
    assert "greedy answers, 4 questions" in plain and "sampled answers, 1 a question" in plain
    assert "A sampled one." not in plain, "side by side stand the greedy answers"
    assert "that training rows repeat, apart" not in plain

    repeats = [
        {"train_id": "t9", "question_id": q, "train_question": "Which?", "similarity": 99.0, "overlap": 1.0, "exact": True}
        for q in ("q0", "q1", "article")
    ]
    apart = fill(Run.create(tmp_path / "run", CONFIG), repeats, trained_on=("q0", "q1"), notes=["A remark on 5 < 6."])
    seen = Tags(build_report(apart)).text
    assert "greedy answers, 2 questions" in seen
    assert "2 questions that training rows repeat, apart from all other figures" in seen
    assert "A remark on 5 < 6." in seen and "it is in the training rows (t9)" in seen
    assert "and were trained on:" in seen and "left out:" not in seen
    assert "t9 repeats q0 (exactly): Which?" in " ".join(seen.split())

    measured = apart.read("metrics") | {"sampled": None, "n_samples": 0, "contaminated": None, "n_contaminated": 0}
    apart.write("metrics", measured)
    seen = Tags(build_report(apart)).text
    assert "sampled answers" not in seen and "apart from all other figures" not in seen and "greedy answers" in seen


def test_the_report_and_model_card_list_repeated_questions(tmp_path):
    shares = {"similarity": 91.5, "overlap": 0.58, "exact": False}
    repeat = {"train_id": "case-9", "question_id": "q1", "train_question": "Which valve, then?"} | shares
    repeated = fill(Run.create(tmp_path / "run", CONFIG), [repeat])
    page = " ".join(Tags(build_report(repeated)).text.split())
    assert "left out:" in page and "No training row repeats" not in page
    assert "case-9 repeats q1 (similarity 91.5, 58 % of its 8-word sequences): Which valve, then?" in page
    assert "1 training rows repeat a held-out question and were left out" in model_card(repeated)


def test_a_repeat_of_an_unasked_row_has_no_broken_link(tmp_path):
    # Notebook 03 looks at all held-out rows, of which only the first are asked.
    repeat = {"train_id": "case-9", "question_id": "row-77", "train_question": "?", "exact": True}
    seen = Tags(build_report(fill(Run.create(tmp_path / "run", CONFIG), [repeat])))
    assert "case-9 repeats row-77" in " ".join(seen.text.split())
    assert {address[1:] for address in seen.addresses if address.startswith("#")} <= set(seen.ids)


def test_rows_without_specialties_give_no_empty_choice(tmp_path):
    # As choose_questions makes them of a data set without that column: the article's.
    bare = [question | {"specialty": question["specialty"] if question["id"] == "article" else ""} for question in QUESTIONS]
    seen = Tags(build_report(fill(Run.create(tmp_path / "run", CONFIG), questions=bare)))
    assert seen.options["specialty"] == ["every specialty", "the article's question"]


def test_two_models_that_wrote_nothing_are_not_furthest_apart(tmp_path):
    silent = fill(Run.create(tmp_path / "run", CONFIG), base=("", False), tuned=("", False), thinking="")
    assert set(re.findall(r'data-apart="([^"]*)"', build_report(silent))) <= {"0", "0.0"}


def test_questions_that_were_trained_on_are_labeled(tmp_path, page):
    repeats = [{"train_id": "t9", "question_id": q, "train_question": "Which?", "exact": True} for q in ("q0", "article")]
    page_ = build_report(fill(Run.create(tmp_path / "run", CONFIG), repeats, trained_on=("q0",)))
    assert tags_of(page_) == {
        "article": ["shown, not scored", "repeated in training"],
        "q0": ["repeated in training, set apart"],
        **{f"q{i}": [] for i in (1, 2, 3)},
    }
    # Repeats that were left out of the training mark nothing.
    dropped = build_report(fill(Run.create(tmp_path / "dropped", CONFIG), repeats))
    assert tags_of(dropped) == tags_of(page) == {"article": ["shown, not scored"]} | {f"q{i}": [] for i in range(4)}


BRACKETS = "% intervals: Wilson's for shares, Newcombe's for differences of shares, else bootstrap over questions."


def test_the_report_and_model_card_name_intervals_and_confidence(tmp_path, page):
    assert f"Brackets: 95 {BRACKETS}" in " ".join(Tags(page).text.split())
    sure = fill(Run.create(tmp_path / "run", load_config("smoke", ["evaluation.confidence_level=0.995"])))
    for text in (Tags(build_report(sure)).text, model_card(sure)):
        assert f"Brackets: 99.5 {BRACKETS}" in " ".join(text.split()) and "95 %" not in text


def test_a_report_without_its_inputs_names_the_notebook(tmp_path):
    with pytest.raises(RunError, match="02_baseline_inference"):
        build_report(Run.create(tmp_path / "run", CONFIG))
    filled = fill(Run.create(tmp_path / "run", CONFIG))
    assert "<h1>" in build_report(filled)
    (filled.path / "metrics.json").unlink()
    with pytest.raises(RunError, match="06_comparison"):
        build_report(filled)


def tags_of(page):
    """{question: what its card is marked with}"""
    cards = re.findall(r'<article id="([^"]*)".*?</article>', page, re.DOTALL)
    parts = re.findall(r"<article .*?</article>", page, re.DOTALL)
    return {card: re.findall(r'<span class="tag changed">([^<]*)</span>', part) for card, part in zip(cards, parts, strict=True)}


# --- model card ----------------------------------------------------------------------------------------------------


def test_the_model_card_has_numbers_license_and_limits(run):
    from huggingface_hub import ModelCard

    text = model_card(run)
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.language == "en"
    assert "Not for clinical use" in card.text and "`apache-2.0`: the base model's license" in card.text
    for name, metric in run.read("metrics")["metrics"].items():
        cells = keep_intervals(" | ".join(format_side(metric, side) for side in ("base", "tuned", "difference")))
        assert f"| {METRICS[name].label.replace('</think>', '`</think>`')} | {cells} | {verdict(name, metric)} |" in card.text
    cut = keep_intervals("at least 7.00 [7.00, 7.00] | 7.00 [7.00, 7.00] | at most 0.00 [0.00, 0.00]")
    assert f"| length of the thinking (tokens) | {cut} |" in card.text, "the base model's were cut off"
    assert keep_intervals("2.00 [2.00, 2.00] | 1.50 [1.50, 1.50] | -0.50 [-0.50, -0.50] | fell, better") in card.text
    assert "the rest on 4 held-out questions" in card.text and card.text.count("training rows;") == 1
    assert "Data: the cases shipped with medcot, written for teaching; 117 training rows;" in card.text
    assert "0.0012" in card.text and "3 of 3 prompts" in card.text
    assert "1.81 nats per token, that of the 4-bit base + adapter 1.95" in card.text and "1 of 3 prompts" in card.text
    assert str(run.path) not in text


def test_the_model_card_says_greedy_even_if_notebook_02_samples(tmp_path):
    sampling = fill(Run.create(tmp_path / "run", load_config("smoke", ["generation.do_sample=true"])))
    card = " ".join(model_card(sampling).split())
    assert "held-out questions, greedy answers of at most" in card and "sampled" not in card


def test_the_model_cards_table_has_every_metric_by_its_label(run):
    import markdown_it

    shown = Tags(markdown_it.MarkdownIt().enable("table").render(model_card(run).split("---", 2)[2]))
    missing = [name for name in run.read("metrics")["metrics"] if METRICS[name].label not in shown.text]
    assert missing == [], "a browser takes some of a label for a tag, or Markdown for a cell's end"


@pytest.mark.parametrize(
    ("name", "license_data"),
    [
        ("unsloth/DeepSeek-R1-Distill-Llama-8B", {"license": "llama3.1"}),
        (
            "me/other",
            {"license": "other", "license_name": "as-the-base-model", "license_link": "https://huggingface.co/me/other"},
        ),
    ],
)
def test_the_model_card_has_the_base_models_license(tmp_path, name, license_data):
    from huggingface_hub import ModelCard

    run = fill(Run.create(tmp_path / "run", load_config("smoke", [f"model.name={name}"])))
    card = ModelCard(model_card(run))
    assert {key: value for key, value in card.data.to_dict().items() if key.startswith("license")} == license_data
    assert f"`{license_data.get('license_name', license_data['license'])}`: the base model's license" in card.text


def test_the_model_card_gives_no_hub_address_to_an_embedded_base(run):
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(run)).data.to_dict()
    assert "base_model" not in data and "datasets" not in data


# --- grades --------------------------------------------------------------------------------------------------------


def test_the_report_gives_the_graded_win_rate_with_its_interval(tmp_path):
    from datetime import UTC, datetime

    from medcot_utils.evaluation.grades import Grade, append_grade, read_pairs, summarize_grades

    graded = fill(Run.create(tmp_path / "run", CONFIG))
    assert summarize_grades(graded) is None and "decided pairs" not in build_report(graded)
    scored = [pair for pair in read_pairs(graded) if pair.question["scored"]]
    for pair, given in zip(scored, ("tuned", "tuned", "base", "tie"), strict=True):
        record = {"id": pair.id, "verdict": given, "note": "", "shown_as_a": pair.shown[0], "answers": pair.digest}
        append_grade(graded, Grade(grader="a", at=datetime.now(UTC), **record))
    found = summarize_grades(graded)
    assert found.counts["tie"] == 1 and found.win_rate["n"] == 3
    # Clopper-Pearson for 2 of 3, from tables: 0.094 to 0.992.
    rate = found.win_rate
    assert (rate["value"], rate["low"], rate["high"]) == pytest.approx((2 / 3, 0.0943, 0.9916), abs=1e-3)
    assert "tuned judged better in 0.67 [0.09, 0.99] of 3 decided pairs" in build_report(graded)
