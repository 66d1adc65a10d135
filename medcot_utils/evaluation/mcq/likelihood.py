"""Read which option is likeliest to a model, through lm-evaluation-harness's own `multiple_choice` tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, TypedDict

from medcot_utils.evaluation.mcq.questions import McqQuestion, choose, quiet, read_questions
from medcot_utils.models.records import ASK_LETTER

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent


class OptionRow(TypedDict):
    """Hold a row of a `multiple_choice` task. Each choice is scored, with a space before it, as what follows the context."""

    context: str
    choices: list[str]
    right: int  # index of the right choice


def text_row(question: McqQuestion) -> OptionRow:
    """Return the row of the likelihood reading: the question alone, and the options' texts.

    lm-eval's ARC task and leaderboards use this form."""
    return _row(question, f"Question: {question['question']}\nAnswer:", [*question["options"].values()])


def letter_row(question: McqQuestion, thought: str) -> OptionRow:
    """Return the row of the letter reading: the options' letters after `thought`, which is prompt and closed thinking."""
    return _row(question, f"{thought}{ASK_LETTER}", [*question["options"]])


def _row(question: McqQuestion, context: str, choices: list[str]) -> OptionRow:
    return {"context": context, "choices": choices, "right": [*question["options"]].index(question["answer"])}


def task_rows(
    rows: Sequence[OptionRow] | None = None,
    limit: int | None = None,
    seed: int = 3407,
    path: str = "shipped",
    name: str | None = None,
    split: str | None = None,
    shape: str = "usual",
    **_: Any,
) -> DatasetDict:
    """Return a task's rows: `rows`, or `text_row` of each question of the source that the task's file names.

    lm-eval calls this as its `custom_dataset`; the other arguments are its own metadata. Raises McqError as `read_questions`
    does."""
    from datasets import Dataset, DatasetDict

    if rows is None:
        rows = [text_row(question) for question in choose(read_questions(path, name, split, shape), limit, seed)]
    return DatasetDict(test=Dataset.from_list([*rows]))


def make_harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> HFLM:
    """Wrap the loaded model for lm-eval. Probabilities are computed in 32 bits: in 16, close options would be equal."""
    from medcot_utils.models.joined_rows import can_join

    with quiet():
        from lm_eval.models.huggingface import HFLM

        from medcot_utils.evaluation.mcq.joined_harness import JoinedHarness

        harness = JoinedHarness if can_join(model) else HFLM
        how = {"batch_size": batch_size, "softmax_dtype": "float32", "trust_remote_code": False}
        return harness(pretrained=model, tokenizer=tokenizer, **how)


def fits(harness: HFLM, row: OptionRow) -> bool:
    """Return whether a row fits the model's context. lm-eval would cut off the beginning of a longer one."""
    longest = max(row["choices"], key=len)
    return len(harness.tok_encode(f"{row['context']} {longest}")) <= harness.max_length


def likeliest_letters(harness: HFLM, rows: Sequence[OptionRow], by_length: bool) -> list[str]:
    """Return the letter of each row's likeliest choice; the first if several are equal.

    `by_length` divides the log-likelihood by the number of characters, so that long texts do not lose for being long. lm-eval
    counts these choices as `acc_norm`, and those without `by_length` as `acc`. The caller's random generators and log levels
    stay as they are."""
    import numpy as np

    with quiet():
        samples = _evaluate(harness, rows)
    letters = []
    for row, sample in zip(rows, samples, strict=True):
        lengths = [len(choice) if by_length else 1 for choice in row["choices"]]
        likelihoods = np.array([likelihood for likelihood, _ in sample["filtered_resps"]])
        letters.append(ascii_uppercase[int(np.argmax(likelihoods / lengths))])
    return letters


def _evaluate(harness: HFLM, rows: Sequence[OptionRow]) -> list[dict[str, Any]]:
    """Return lm-eval's samples, in the order of the rows."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    # simple_evaluate would seed the caller's generators and describe the machine each time, which takes seconds.
    drawn = random.getstate()  # TaskManager draws random names
    try:
        tasks = TaskManager(include_path=TASKS, include_defaults=False, metadata={"rows": rows}).load(["medcot_file"])
        found = evaluate(lm=harness, task_dict=tasks, bootstrap_iters=0, log_samples=True)
    finally:
        random.setstate(drawn)
    return sorted(found["samples"]["medcot_file"], key=lambda sample: sample["doc_id"])
