"""Two models' multiple-choice answers side by side: questions seen in training set apart."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.mcq.run import load_questions
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
