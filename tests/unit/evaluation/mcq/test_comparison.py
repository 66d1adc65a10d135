"""Two models' multiple-choice answers side by side: questions seen in training set apart, and a GPU that is too small."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.mcq.run import load_questions, run_mcq
from medcot_utils.evaluation.mcq.scores import compare_mcq, seen_in_training

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])


def answered(questions, right):
    keys = {"task": "shipped", "abstained": False}
    return [question | keys | {"correct": index < right} for index, question in enumerate(questions)]


@pytest.fixture
def train():
    from datasets import Dataset

    asked = load_questions("shipped", 3)[1]["question"]
    rows = [{"id": "row-0", "Question": "Another thing altogether?"}, {"id": "row-1", "Question": asked.upper() + " !"}]
    return Dataset.from_list([row | {"Complex_CoT": "", "Response": ""} for row in rows])


def test_a_contaminated_question_does_not_count(train):
    questions = load_questions("shipped", 9)
    repeated = load_questions("shipped", 3)[1]
    assert repeated in load_questions("shipped")
    if repeated not in questions:
        questions.append(repeated)
    base, tuned = answered(questions, 2), answered(questions, len(questions))
    seen = seen_in_training(tuned, train, CONFIG.dataset)
    assert seen == {("shipped", repeated["id"])}
    metrics = compare_mcq(base, tuned, seen, CONFIG.evaluation)
    assert metrics["mcq_accuracy"]["n"] == len(questions) - 1 == metrics["mcq_abstained"]["n"]
    assert compare_mcq(base, tuned, set(), CONFIG.evaluation)["mcq_accuracy"]["n"] == len(questions)


def test_where_every_question_was_seen_nothing_is_compared():
    records = answered(load_questions("shipped", 3), 1)
    assert compare_mcq(records, records, {("shipped", record["id"]) for record in records}, CONFIG.evaluation) == {}


@pytest.mark.model
def test_a_batch_too_large_for_the_gpu_is_halved_simulated(monkeypatch, capsys):
    import torch

    from medcot_utils.models.engine import get_engine

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    model = engine.for_inference(model)
    how = {"limit": 5, "max_new_tokens": 12, "seed": 2}
    expected = run_mcq(model, tokenizer, "shipped", batch_size=1, **how)

    generate, sizes = model.generate, []

    def on_a_small_gpu(**arguments):
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", on_a_small_gpu, raising=False)
    found = run_mcq(model, tokenizer, "shipped", batch_size=5, **how)
    assert sizes == [5, 2, 3, 1, 2]
    assert [record["completion"] for record in found] == [record["completion"] for record in expected]
    assert "out of memory: 5 questions in two halves" in capsys.readouterr().err

    def on_none(**arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(model, "generate", on_none, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        run_mcq(model, tokenizer, "shipped", batch_size=5, **how)
