"""The numbers of README and docs/results.md are those of docs/demo.json, and the sentences are those of the verdicts."""

from __future__ import annotations

import json
import re

import made_up_measures
import pytest
from made_up_runs import MORE, fill_more

from medcot_utils.evaluation.claims import CLAIMS
from medcot_utils.machine import redaction
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.files import to_json
from medcot_utils.series import results
from medcot_utils.series.committed import _ABSOLUTE_PATH
from medcot_utils.series.results import ResultsError, differing, fill_parts, in_short, verdicts_of
from medcot_utils.series.results_text import DIFFERS, write_parts


@pytest.fixture
def demo():
    return made_up_measures.demo()


def text_of(demo, part, differing=()):
    return " ".join(write_parts(demo, differing)[part].split())


# --- what is committed -----------------------------------------------------------------------------------------------


def test_the_committed_documents_say_what_the_demo_measured():
    assert results.faults() == []


@pytest.fixture
def documents(monkeypatch, tmp_path):
    """Copies of the committed documents, which a test may change."""
    copies = tuple(tmp_path / path.name for path in results.DOCUMENTS)
    for copy, path in zip(copies, results.DOCUMENTS, strict=True):
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(results, "DOCUMENTS", copies)
    return copies


@pytest.mark.parametrize("which", [0, 1], ids=["README", "results"])
def test_a_number_edited_by_hand_is_found_and_written_again(documents, which):
    path, text = documents[which], documents[which].read_text(encoding="utf-8")
    begin = text.index("<!-- demo: ")
    number = re.compile(r"\d+\.\d\d").search(text, begin)
    path.write_text(text[: number.start()] + "9.87" + text[number.end() :], encoding="utf-8")
    assert results.faults() == [f"{path.name} does not say what docs/demo.json holds: make results writes it"]
    assert results.write_documents() == [path] and path.read_text(encoding="utf-8") == text
    assert results.write_documents() == []


def test_a_part_that_no_document_has_is_a_fault(documents):
    text = documents[1].read_text(encoding="utf-8")
    documents[1].write_text(re.sub(r"<!-- demo: loss -->.*?<!-- end -->\n", "", text, flags=re.DOTALL), encoding="utf-8")
    assert results.faults() == ["no document has the part loss"]


def test_a_figure_of_other_numbers_is_found_and_drawn_again(documents, monkeypatch, tmp_path, demo):
    monkeypatch.setattr(results, "FIGURE", tmp_path / "comparison.png")
    figure_fault = ["comparison.png was not drawn from docs/demo.json: make results draws it"]
    assert results.faults() == figure_fault and results.write_documents() == [results.FIGURE] and results.faults() == []
    demo["metrics"]["metrics"]["rouge_l"]["base"]["value"] = 0.99
    monkeypatch.setattr(results, "DEMO", tmp_path / "demo.json")
    results.DEMO.write_text(to_json(demo), encoding="utf-8")
    assert figure_fault[0] in results.faults()


def test_a_part_of_an_unknown_name_is_an_error():
    with pytest.raises(ResultsError, match="unknown part tables: expected one of table"):
        fill_parts("<!-- demo: tables -->\n<!-- end -->\n", {"table": ""})


def test_the_committed_numbers_name_no_machine():
    text = results.DEMO.read_text(encoding="utf-8")
    assert not _ABSOLUTE_PATH.search(text) and not redaction.kind_of(text)
    committed = json.loads(text)
    assert set(committed["machine"]) == {"processor", "cores"} and re.fullmatch(r"[0-9a-f]{12}", committed["commit"])
    assert list(committed["seconds"]) == list(STEPS)


def test_no_number_of_the_demo_stands_outside_its_parts():
    for path in results.DOCUMENTS:
        text = path.read_text(encoding="utf-8").partition("## On real rows")[0]
        outside = results._PART.sub("", text)
        lines = [line for line in outside.splitlines() if not re.search("H[12]00", line)]
        numbers = re.findall(r"\d+\.\d\d", re.sub(r"\(https?:[^)]*\)", "", "\n".join(lines)))
        assert set(numbers) <= {"3.11", "3.12", "3.13"}, "Python's versions"


# --- sentences by verdict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0.0, 1.0, 0.1), "their thinking rose from 0.00 to 1.00."),
        ((1.0, 0.0, 0.1), "their thinking fell from 1.00 to 0.00."),
        ((0.4, 0.5, 0.4), "their thinking shows no difference (0.40 and 0.50)."),
    ],
)
def test_the_caption_says_what_became_of_the_form(demo, values, said):
    demo["metrics"]["metrics"]["closed_think_rate"] = made_up_measures.metric(*values)
    assert said in text_of(demo, "caption") and said in text_of(demo, "conclusions")


@pytest.mark.parametrize(
    ("share", "learning", "said"),
    [
        (
            0.48,
            -0.42,
            "48 % of the fall of the held-out loss only makes up for the cost of rounding the base to 4 bits. The tuned",
        ),
        (1.3, 0.2, "All of the fall of the held-out loss only makes up for the cost of rounding the base to 4 bits. The tuned"),
        (-0.1, -0.42, "None of the fall"),
        (1.3, 0.2, "The tuned model's loss is 0.20 above"),
        (0.48, -0.42, "The tuned model's loss is 0.42 below"),
        (None, 0.0, "The held-out loss did not fall clearly."),
        (0.5, 0.0, "No difference from the 16-bit base's loss is shown."),
    ],
)
def test_the_loss_sentence_tells_learning_from_rounding(demo, share, learning, said):
    losses = demo["metrics"]["losses"]
    losses["share"] = share and made_up_measures.estimate(share, 0.04, 40)
    losses["learning"] = made_up_measures.estimate(learning, 0.04, 40) | {"needed": 6}
    assert said in text_of(demo, "loss")


@pytest.mark.parametrize(
    ("behaves", "said"),
    [
        ("yes", "The merged model, which people load, behaves as measured."),
        ("no", "does not behave as measured."),
        ("can't tell", "questions cannot show whether the merged model, which people load, behaves as measured in form"),
    ],
)
def test_the_merged_sentence_follows_its_verdict(demo, behaves, said):
    demo["merged"]["behaves"] = behaves
    assert said in text_of(demo, "caption") and said in text_of(demo, "merged")


def test_claims_are_counted_by_their_verdicts(demo):
    said = "The article makes three claims: one holds, one does not hold, and one cannot be decided with these questions."
    assert said in text_of(demo, "conclusions")
    key = "claim/Claim A"
    said = "one does not hold, one cannot be decided with these questions, and the verdict on one differs"
    assert said in text_of(demo, "conclusions", {key})
    assert f"| Claim A | 2.00 to 1.50 | {DIFFERS} |" in text_of(demo, "claims", {key})


def test_a_run_that_measured_less_is_written_too(demo):
    for name in ("forced", "losses", "mcq_readings"):
        del demo["metrics"][name]
    demo["merged"] = None
    parts = write_parts(demo, set())
    assert "forced" not in parts["answers"] and "merged" not in parts["caption"]
    assert parts["loss"] == "The 16-bit base's loss was not taken." and parts["merged"] == "The merged model was not measured."


# --- verdicts on several machines --------------------------------------------------------------------------------------


def machines(**verdicts):
    return {"what": "", "environments": {name: {"commit": "", "machine": {}, "verdicts": one} for name, one in verdicts.items()}}


def test_a_verdict_that_flips_between_machines_is_found():
    same = {"as they answer/rouge_l": "rose", "claim/x": "holds"}
    assert differing(machines(one=same, two=same)) == set() == differing(None)
    flipped = same | {"claim/x": "can't tell"}
    assert differing(machines(one=same, two=same, three=flipped)) == {"claim/x"}
    assert differing(machines(one=same, two={"claim/x": "holds"})) == {"as they answer/rouge_l"}, "not measured there"


def test_a_flipped_verdict_is_marked_in_every_table(demo):
    keys = verdicts_of(demo["metrics"], demo["merged"])
    parts = write_parts(demo, set(keys))
    for name in ("table", "answers", "choice", "claims", "merged", "caption"):
        assert DIFFERS in parts[name] and DIFFERS not in write_parts(demo, set())[name], name
    assert not re.search(r"rose|fell", parts["table"] + parts["choice"] + parts["answers"])


def test_verdicts_are_kept_without_reasons_and_numbers(demo):
    found = verdicts_of(demo["metrics"], demo["merged"])
    assert found["as they answer/eval_loss"] == "fell" and found["forced closing/rouge_l"] == "no difference shown"
    assert found["claim/Claim B"] == "does not hold" and found["claim/Claim C"] == "can't tell"
    assert found["multiple choice/shipped/letter"] == "no difference shown"
    assert found["merged model/closed_think_rate"] == "differs" and found["merged model/eval_loss"] == "behaves as measured"
    assert in_short("holds") == "holds" and len({claim.text for claim in CLAIMS}) == len(CLAIMS)


# --- from a run --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("documents")
def test_a_finished_run_gives_the_numbers_and_the_documents(tmp_path, monkeypatch):
    run = fill_more(Run.create(tmp_path / "run", MORE))
    run.write("machine", {"system": "Linux x86_64", "processor": "x86_64 with AVX2", "cpu_cores": 2})
    for name in STEPS:
        run.record_step(name, state="done", seconds=61.23, peak_memory_mb=900)
    for name, file in (("DEMO", "demo.json"), ("FIGURE", "comparison.png"), ("MACHINES", "none.json")):
        monkeypatch.setattr(results, name, tmp_path / file)
    changed = results.write_results(run)
    assert [path.name for path in changed] == ["demo.json", "comparison.png", "README.md", "results.md"], "in this order"
    demo = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert demo["metrics"] == run.read("metrics") and demo["merged"] == run.read("merged_metrics")
    assert demo["settings"]["answer_tokens"] == 12 and demo["seconds"]["07_export"] == 61.2
    assert str(tmp_path) not in to_json(demo) and results.faults() == []
    assert "6 steps of 4 rows" in (changed[-1]).read_text(encoding="utf-8")
