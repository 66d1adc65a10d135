"""Report, model card and grading page of runs that hold little, or numbers for names: 'none' stands where there is none."""

from __future__ import annotations

import re

import pytest
from made_up_runs import ATTACK, CONFIG, MORE, QUESTIONS, Tags, fill, fill_more, retrain
from matplotlib.figure import Figure

from medcot_utils import evaluation, plots
from medcot_utils.cli.grading_page import Desk
from medcot_utils.config import load_config
from medcot_utils.evaluation.report import build_report
from medcot_utils.export.model_card import model_card
from medcot_utils.models.embedded import warn_of_random_weights
from medcot_utils.run.directory import Run

pytestmark = pytest.mark.usefixtures("undrawn_figures")

SCORED = [question["id"] for question in QUESTIONS if question["scored"]]


def shown(page):
    return " ".join(Tags(page).text.split())


def unmeasured(run):
    """Write the metrics of a run in which training rows repeat every scored question and held-out row."""
    nothing = run.read("metrics") | {"n_questions": 0, "metrics": {}, "sampled": None, "n_answered": 0, "answered": {}}
    nothing |= {"n_contaminated": 0, "contaminated": None}
    run.write("metrics", nothing | {"claims": evaluation.judge({}, {}, {})})
    return run


@pytest.fixture(scope="module")
def all_apart(tmp_path_factory):
    """A run whose scored questions were all trained on, with numbers for specialties and a log without a step."""
    numbered = [question | {"specialty": 3 if question["scored"] else "the article's question"} for question in QUESTIONS]
    repeats = [{"train_id": "t9", "question_id": name, "train_question": "Which?", "exact": True} for name in SCORED]
    run = fill(Run.create(tmp_path_factory.mktemp("apart") / "run", CONFIG), repeats, SCORED, questions=numbered)
    assert list(run.read("metrics")["metrics"]) == [
        "eval_loss",
        "perplexity",
        "mcq_accuracy",
        "mcq_abstained",
        "mcq_accuracy_answered",
    ]
    run.write("training_log", [{"step": 6, "train_loss": 1.5}])
    return run


def test_a_run_with_every_question_set_apart_is_reported(all_apart):
    page = build_report(all_apart)
    assert "the rest over 0 held-out questions" in shown(page) and "no question was answered by both models" in shown(page)
    assert f"{len(SCORED)} questions that training rows repeat" in shown(page)
    assert "on 0 held-out questions" in model_card(all_apart) and "No question counts" in model_card(all_apart)


def test_a_number_for_a_specialty_is_a_choice_like_any_other(all_apart):
    page = build_report(all_apart)
    assert Tags(page).options["specialty"] == ["every specialty", "3", "the article's question"]
    assert len(re.findall('data-specialty="3"', page)) == len(SCORED)


def test_a_run_that_measured_nothing_says_none(all_apart):
    run = unmeasured(all_apart)
    assert "What changed No metric was measured." in shown(build_report(run))
    assert "| none |" in model_card(run)


@pytest.mark.parametrize(("specialty", "tags"), [("a & b", ["a &amp; b"]), (7, ["7"]), ("", [])])
def test_the_grading_pages_heading_names_any_specialty(tmp_path, specialty, tags):
    run = Run.create(tmp_path / "run", CONFIG)
    question = {"id": "q0", "scored": True, "specialty": specialty, "Question": "Which valve?", "Response": "The mitral."}
    run.write("questions", [question])
    for name in ("train_rows", "held_out_rows"):
        run.write(name, lambda file: file.write_bytes(b"rows"))
    run.write("adapter", lambda folder: (folder / "weights.bin").write_bytes(b"0"))
    for name in ("base_answers", "tuned_answers"):
        run.write(name, [{"id": "q0", "sample": 0, "thinking": "so", "answer": name}])
    desk = Desk(run, "grader")
    heading = desk.heading(desk.next_pair())
    assert heading.count('class="tag"') == len(tags) and all(f">{tag}</span>" in heading for tag in tags)


# --- both readings, three bars, the merged model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured_more(tmp_path_factory):
    """The page of a run that measured everything."""
    return build_report(fill_more(Run.create(tmp_path_factory.mktemp("more") / "run", MORE)))


def table(page, name):
    """The rows of a run's table, each as the texts of its cells."""
    found = re.search(rf'<table class="{name}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found[1], re.DOTALL)
    return [[shown(cell) for cell in re.findall(r"<t[hd][^>]*>.*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_the_report_opens_with_the_figure_and_what_was_decided(measured_more):
    order = ["<img", "Decided: each holds or does not", "Claim A", "Claim B", "Not decided", "Claim C", "What changed", "<table"]
    places = [measured_more.index(order[0])]
    for text in order[1:]:
        places.append(measured_more.index(text, places[-1]))
    assert places == sorted(places)
    assert "about 90 would tell" in measured_more[places[4] : places[6]]
    assert '<td data-label="questions it would take">90</td>' in measured_more
    assert measured_more.count("Beside it: none beside") == 3
    assert re.findall(r'<td data-label="verdict" class="(\w*)">(?:holds|does not|can)', measured_more) == ["holds", "doesnot", ""]


def test_both_readings_stand_beside_each_other_with_the_merged(measured_more):
    heads, names, *rows = table(measured_more, "metrics")
    assert heads == ["", "as they answer by themselves", "with forced closing"]
    assert names[1:] == ["base", "tuned", "merged", "difference, tuned from base"] * 2
    rouge = next(row for row in rows if row[0].startswith("ROUGE-L"))
    assert [cell.split(" [")[0] for cell in rouge[1:4]] == ["0.00", "0.16", "0.15"]
    assert [cell.split(" [")[0] for cell in rouge[5:8]] == ["0.13", "0.16", ""]
    loss = next(row for row in rows if row[0].startswith("held-out loss"))
    assert loss[4].endswith("fell, better") and loss[5:] == [""] * 4, "the loss knows no closing"


def test_the_loss_stands_in_three_bars_with_their_difference(measured_more):
    lines = {name: value.split(" [")[0] for name, value in table(measured_more, "losses")[1:]}
    assert [*lines.values()] == ["3.60", "3.99", "3.18", "0.39", "-0.42", "0.48"]


def test_multiple_choice_has_a_line_for_each_reading(measured_more):
    strict, letter, likelihood = table(measured_more, "readings")[1:]
    assert strict[0] == "shipped, strict what strict reads" and strict[1:3] == ["20", "0.25"]
    assert "none read, 20 abstained" in strict[3] and "p = 0.500 against chance" in letter[3]
    assert likelihood[5].endswith("p = 0.800 (McNemar)")


def test_the_merged_model_has_its_verdict_and_difference(measured_more):
    page = shown(measured_more)
    assert "Does the merged model behave as measured? Form: no, fewer answers close their thinking. Loss: yes." in page
    assert "form: answers that close their thinking once: differs: fell, worse" in page
    closed = next(row for row in table(measured_more, "merged")[1:] if row[0].startswith("answers that close"))
    assert [cell.split(" [")[0] for cell in closed[1:3]] == ["1.00", "0.71"] and closed[3].startswith("-0.29")


def test_a_merged_model_not_measured_yet_is_left_to_notebook_07(tmp_path):
    run = fill_more(Run.create(tmp_path / "run", MORE), merged=False)
    page = build_report(run)
    assert "Merged model: see notebook 07." in shown(page) and 'class="merged"' not in page
    assert "erged model" not in shown(build_report(fill(Run.create(tmp_path / "old", CONFIG))))


def test_the_merged_model_of_an_earlier_adapter_is_left_out(tmp_path):
    run = retrain(fill_more(Run.create(tmp_path / "run", MORE)))
    assert run.is_fresh("merged_answers"), "by its own inputs: the merged weights are still those that it came from"
    page = build_report(run)
    assert "<title>medcot: base and tuned</title>" in page and "<h3>merged</h3>" not in page and 'class="merged"' not in page
    assert "The merged model is stale: run notebook 07_export." in shown(page)
    assert not re.search(r"<th>merged</th>|The merged one\.", page) and "This run is stale" not in page


def test_the_report_says_that_random_weights_mean_nothing(tmp_path):
    line = warn_of_random_weights("embedded:tiny-random-llama")
    assert line in shown(build_report(fill(Run.create(tmp_path / "smoke", load_config("smoke")))))
    assert line not in shown(build_report(fill(Run.create(tmp_path / "demo", load_config("demo")))))


def test_results_of_other_settings_are_said_to_be_stale(tmp_path):
    fill(Run.create(tmp_path / "run", CONFIG))
    changed = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"learning_rate": 0.1})})
    stale = Run.create(tmp_path / "run", changed)
    line = "stale: its settings or inputs changed after these results. Run notebook 04_lora_config, and those after it."
    assert f"This run is {line}" in shown(build_report(stale))
    page = shown(build_report(fill(Run.create(tmp_path / "other", CONFIG)), stale))
    assert f"Run run is {line}" in page and "Run other is stale" not in page


def test_a_merged_model_too_large_for_the_gpu_says_so(tmp_path):
    run = fill_more(Run.create(tmp_path / "run", MORE), not_measured="needs 15.0 GiB")
    page = build_report(run)
    assert "Its answers were not measured: needs 15.0 GiB." in shown(page)
    assert len(table(page, "merged")) == 2, "a head and the loss"
    assert "<h3>merged</h3>" not in page


def test_the_held_out_loss_starts_with_the_base_on_those_rows(tmp_path, monkeypatch):
    run = fill(Run.create(tmp_path / "run", CONFIG))
    losses = [record | {"nll": 10.0 * place} for place, record in enumerate(run.read("held_out_loss"))]
    run.write("held_out_loss", losses[8:] + losses[:8])
    run.write("metrics", run.read("metrics"))
    drawn = []
    monkeypatch.setattr(plots, "loss_figure", lambda *data, narrow: drawn.append(data) or Figure())
    build_report(run)
    rows = [loss["nll"] / loss["tokens"] for loss in losses if loss["model"] == "base"][: CONFIG.training.eval_rows]
    assert rows == [0.0, 1.0, 2.0, 3.0]
    assert drawn == [(run.read("training_log"), 1.5)] * 2, "wide and narrow"


# --- what each model wrote -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closed_by", "why"),
    [("budget", "its budget ended its thinking"), ("end", "it ended its text without closing its thinking")],
)
def test_a_forced_answer_is_labeled_below_what_was_written(tmp_path, closed_by, why):
    page = build_report(fill_more(Run.create(tmp_path / "run", MORE), closed_by=closed_by))
    base, tuned, merged = re.findall(r"<section><h3>(.*?)</section>", page, re.DOTALL)[:3]
    assert base.startswith("base") and tuned.startswith("tuned") and merged.startswith("merged")
    assert '<details class="thinking" open><summary>everything that it wrote by itself' in base and "A murmur, I think." in base
    assert f"Answer with forced closing ({why}):" in base and ATTACK in Tags(base).text and ATTACK not in base
    assert "forced closing" not in tuned and "The mitral valve." in tuned and "The merged one." in merged
    assert "(no answer" not in page


def test_an_answer_of_white_space_alone_is_said_to_be_one(tmp_path):
    blank = {"base": ("\n\n\n", False), "tuned": ("Rest.", True), "thinking": ""}
    page = build_report(fill(Run.create(tmp_path / "run", CONFIG), **blank))
    base, tuned = re.findall(r"<section><h3>(.*?)</section>", page, re.DOTALL)[:2]
    assert "(nothing but white space)" in base and "Rest." in tuned


def test_tags_in_what_a_model_wrote_are_shown_as_text(tmp_path):
    tagged = {"base": ("", False), "tuned": ("Rest.</think>Fluids.", True), "thinking": "so <think> it is"}
    page = build_report(fill(Run.create(tmp_path / "run", CONFIG), **tagged))
    base, tuned = re.findall(r"<section><h3>(.*?)</section>", page, re.DOTALL)[:2]
    assert "everything that it wrote by itself" in base and "so &lt;think&gt; it is" in base
    assert "so &lt;think&gt; it is" in tuned and "Rest.&lt;/think&gt;Fluids." in tuned
