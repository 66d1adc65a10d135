"""The merged model measured: opened once, asked what its settings and the GPUs allow, its loss taken one way or the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from made_up_runs import QUESTIONS, answer, fill

from medcot_utils.config import load_config
from medcot_utils.export import measured
from medcot_utils.export.measured import measure_merged, open_merged
from medcot_utils.run.directory import Run

ON, OFF = ["evaluation.measure_merged=true", "evaluation.answer_tokens=9"], ["evaluation.measure_merged=false"]
SCORED = [question["id"] for question in QUESTIONS if question["scored"]]
REPEAT = {"train_id": "t9", "question_id": "q0", "train_question": "Which?", "exact": True}
HELD, IN_PART = SimpleNamespace(), SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "cpu"})


@pytest.fixture
def asked(monkeypatch):
    """What the merged model was asked, and what its measures were compared on; no model answers."""
    from medcot_utils import evaluation

    seen = SimpleNamespace(questions=None, compared=None, losses=[])

    def answers(model, tokenizer, questions, settings, newline, seed, answer_tokens, journal):
        seen.questions, seen.how = [question["id"] for question in questions], (answer_tokens, journal.path.name)
        seen.cache = settings.cache_implementation
        return [answer(question, "An answer.", True) for question in questions]

    def losses(model, rows, batch_size, label):
        seen.losses.append(model)
        return [{"model": label, "id": f"h{i}", "nll": 12.0, "tokens": 10} for i in range(8)]

    def score_merged(questions, tuned, merged, data_report):
        pairs = evaluation.score(questions, [record for record in tuned], [record for record in tuned], data_report)
        counted = [one for one in pairs.counted if one.question["id"] in {record["id"] for record in merged}]
        return SimpleNamespace(counted=counted, repeated_by=pairs.repeated_by)

    def compare_merged(questions, losses, settings, seed, not_measured=None):
        seen.compared = [one.question["id"] for one in questions], {(r["model"], r["id"]) for r in losses}, not_measured
        return {"n_questions": len(questions), "not_measured": not_measured}

    monkeypatch.setattr(measured, "answer_questions", answers)
    monkeypatch.setattr(measured, "row_losses", losses)
    monkeypatch.setattr(measured, "count_weight_bytes", lambda *what: 4 * 2**30)
    monkeypatch.setattr(measured, "evaluation", SimpleNamespace(score_merged=score_merged, compare_merged=compare_merged))
    return seen


def made(folder, *settings, **given):
    return fill(Run.create(folder / "run", load_config("smoke", [*ON, *settings])), **given)


def test_a_merged_model_that_is_held_is_asked_all_questions(asked, tmp_path):
    run = made(tmp_path)
    found = measure_merged(run, HELD, None)
    assert asked.questions == [question["id"] for question in QUESTIONS] and asked.how == (9, "merged_answers.jsonl.part")
    assert asked.cache == "auto"
    assert asked.compared == (SCORED, {(model, f"h{i}") for model in ("tuned", "merged") for i in range(8)}, None)
    assert found == run.read("merged_metrics") == {"n_questions": 4, "not_measured": None}
    assert len(run.read("merged_answers")) == 5 and len(run.read("merged_loss")) == 8


def test_a_merged_model_on_two_gpus_needs_no_slots(asked, tmp_path):
    run = made(tmp_path, "generation.cache_implementation=static")
    measure_merged(run, SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": 1}), None)
    assert asked.cache == "dynamic" and asked.questions == [question["id"] for question in QUESTIONS]


def test_questions_and_rows_that_training_repeats_do_not_count(asked, tmp_path):
    run = made(tmp_path, repeats=[REPEAT, REPEAT | {"question_id": "h3"}], trained_on=("q0",))
    measure_merged(run, HELD, None)
    questions, losses, _ = asked.compared
    assert questions == SCORED[1:] and "q0" in asked.questions
    assert {row for _, row in losses} == {f"h{i}" for i in range(8) if i != 3}


@pytest.mark.parametrize(
    ("model", "settings", "expected", "why"),
    [
        (IN_PART, [], None, "needs 5.0 GiB of GPU memory"),
        (IN_PART, ["evaluation.merged_questions=2"], ["q0", "q1"], None),
        (HELD, ["evaluation.merged_questions=2"], ["q0", "q1"], None),
        (HELD, ["evaluation.merged_questions=0"], None, "evaluation.merged_questions is 0"),
    ],
)
def test_a_merged_model_that_is_not_held_is_asked_as_set(asked, tmp_path, model, settings, expected, why):
    run = made(tmp_path, *settings)
    measure_merged(run, model, None)
    assert asked.questions == expected and asked.compared[::2] == (expected or [], why)
    assert len(asked.losses) == 1, "the loss is taken all the same"


def test_nothing_is_measured_where_the_setting_is_off(asked, tmp_path):
    run = made(tmp_path, *OFF)
    assert measure_merged(run, HELD, None) is None
    assert asked.questions is None and asked.losses == []


def test_a_measured_merged_model_is_not_asked_again(asked, tmp_path):
    run = made(tmp_path)
    first = measure_merged(run, HELD, None)
    asked.questions, asked.losses = None, []
    assert measure_merged(run, HELD, None) == first and asked.questions is None and asked.losses == []


# --- open ----------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize(("settings", "fits"), [(ON, True), (ON, False), (OFF, False)])
def test_a_model_too_large_has_its_loss_before_it_is_loaded(tmp_path, monkeypatch, settings, fits):
    import shutil

    from medcot_utils.models.embedded import find_model_source

    run = fill(Run.create(tmp_path / "run", load_config("smoke", settings)))
    source = find_model_source("embedded:tiny-random-llama")
    run.write("merged", lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))
    order, load = [], measured.load_unquantized

    def layerwise(folder, dtype, rows, batch_size, label):
        order.append((dtype, label, batch_size, len(rows)))
        return [{"model": label, "id": "t0", "nll": 1.0, "tokens": 2}]

    monkeypatch.setattr(measured, "layerwise_losses", layerwise)
    monkeypatch.setattr(measured, "fits_in_memory", lambda weights: fits)
    monkeypatch.setattr(measured, "load_unquantized", lambda *what: order.append("loaded") or load(*what))
    model, tokenizer = open_merged(run)
    taken = settings == ON and not fits
    assert order == [("float16", "merged", run.config.training.per_device_eval_batch_size, 1)] * taken + ["loaded"]
    assert not model.training and tokenizer.eos_token_id is not None
    assert run.is_fresh("merged_loss") is taken
