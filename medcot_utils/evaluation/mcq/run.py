"""Ask multiple-choice questions with the project's own prompt, and read each answer in three ways.

The strict reading uses what the model writes. An answer that it cannot read counts as abstained, not as wrong. The letter and
the likelihood readings use what the model finds likeliest; see `readings.MEASURES`. If thinking was closed for the model, the
letter is read at that point. lm-eval computes the other letters and the likelihoods."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired

import yaml

from medcot_utils.config import RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.evaluation.mcq.likelihood import (
    TASKS,
    OptionRow,
    fits,
    letter_row,
    likeliest_letters,
    make_harness,
    text_row,
)
from medcot_utils.evaluation.mcq.questions import McqError, McqQuestion, choose, read_questions
from medcot_utils.evaluation.mcq.strict import read_answer
from medcot_utils.models.records import ASK_LETTER, CLOSING, AnswerRecord
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.models.other_gpus import OtherGpus
    from medcot_utils.run.journal import Journal

TASK_NAMES = ("shipped", "medqa", "medmcqa", "pubmedqa")

# lm-eval computes the probability of every vocabulary entry at every position: 16 contexts of 300 tokens take a gigabyte with
# a vocabulary of 50,000.
_GPU_BATCH, _CPU_BATCH = 16, 4
_KEPT_AT_ONCE = 16  # questions whose likelihoods are computed and recorded together, whatever the batch size

ASK = 'End your response with one line of the form "Answer: X", where X is the letter of the right option.'


class _KeptAnswer(AnswerRecord):
    """Hold an answer with the letters read so far: a record of the journal, while the artifact is made."""

    likelihood: NotRequired[str]


class McqAnswer(McqQuestion):
    """Hold a question with one model's greedy answer: a line of base_mcq.jsonl or tuned_mcq.jsonl.

    Runs of earlier versions have only the strict reading."""

    model: str  # base or tuned
    task: str  # a name of TASK_NAMES, or a file's name
    completion: str
    read: str | None  # the letter that was read, see `read_answer`
    correct: bool
    abstained: bool  # no letter could be read; never correct
    closed_by: NotRequired[Literal["itself", "budget", "end"]]  # what ended its thinking, as in `records.ForcedAnswer`
    letter: NotRequired[str]  # the likeliest letter after thinking that is closed, by the model or for it
    likelihood: NotRequired[str]  # the letter of the option whose text is likeliest by length, without thinking


# --- the questions -------------------------------------------------------------------------------------------------


def load_questions(task: str, limit: int | None = None, seed: int = 3407) -> list[McqQuestion]:
    """Return the questions of a named task (`TASK_NAMES`) or of a local .jsonl file; at most `limit`, by `choose`.

    If there are fewer than `limit`, all are returned and a message says so. A file's rows hold `question`; `options` as
    {letter: text} or a list; `answer_idx` or else `answer`, as a letter, an index from 0, or the option's text; and optionally
    `id` and `specialty`. Raises McqError for an unknown task, a data set that cannot be loaded, and a file whose rows lack a
    column, repeat an id, or have an empty option or an answer that is not an option."""
    if task in TASK_NAMES:
        source = yaml.safe_load((TASKS / f"{task}.yaml").read_text(encoding="utf-8"))["dataset_kwargs"]
    elif task.endswith(".jsonl"):
        source = {"path": task}
    else:
        match = difflib.get_close_matches(task.lower(), TASK_NAMES, 1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise McqError(f"unknown multiple-choice task {task!r}: expected {', '.join(TASK_NAMES)} or a .jsonl file{hint}")
    questions = read_questions(**source)
    if limit and limit > len(questions):
        say(f"{task} has {len(questions)} questions, fewer than evaluation.mcq_limit ({limit}): all of them are asked")
    return choose(questions, limit, seed)


def prompt(question: McqQuestion, newline_after_think: bool = True) -> str:
    """Return the project's inference prompt for the question, its options as lines, and the sentence that asks for the form."""
    options = "\n".join(f"{letter}. {text}" for letter, text in question["options"].items())
    return inference_prompt(f"{question['question']}\n\n{options}\n\n{ASK}", newline_after_think)


def list_prompts(config: RunConfig) -> list[str]:
    """Return the prompts of all questions, each with the text that the letter reading adds after the thinking.

    With evaluation.mcq_max_new_tokens added, each must fit the model's context (`models.batches.check_context`). Raises
    McqError as `load_questions` does."""
    newline = config.prompt.newline_after_think
    return [f"{prompt(question, newline)}{CLOSING}{ASK_LETTER} A" for _, question in _load_all(config).values()]


def _load_all(config: RunConfig) -> dict[str, tuple[str, McqQuestion]]:
    """Return {task/id: (task, question)}. A file's task includes its folder, because file names may repeat."""
    settings = config.evaluation
    return {
        f"{task}/{question['id']}": (task, question)
        for task in settings.mcq_tasks
        for question in load_questions(task, settings.mcq_limit, config.seed)
    }


# --- the run -------------------------------------------------------------------------------------------------------


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    label: str,
    journal: Journal | None = None,
    others: OtherGpus | None = None,
) -> list[McqAnswer]:
    """Ask the questions of every task of evaluation.mcq_tasks.

    Each question is answered once, greedily. If evaluation.answer_tokens is set, thinking that the model leaves open is closed
    for it, so that every question has a letter; no answer is written after that. If it is not set, open thinking has no
    `letter`. Only a data set from the Hub needs the network.

    Args:
        label: the model's label in the records, `base` or `tuned`.
        journal: records answers and letters as they are made; questions that it holds are not asked again. (lm-eval's own
            cache knows neither the model nor the settings that its values came from, and it is a pickle, which a run must not
            hold.)
        others: the processes on the other GPUs, which answer too. Only this process does lm-eval's part afterward, one forward
            pass per question or option.

    Raises:
        McqError: as `load_questions` does.
        GenerationError: if a prompt and evaluation.mcq_max_new_tokens exceed the model's context, or another GPU's process
            fails.
        TimeBudgetReached: if training.max_hours is nearly over; the journal keeps what was made."""
    from medcot_utils.models.batches import check_context
    from medcot_utils.models.generation import Asked, answer_prompts

    questions, settings = _load_all(config), config.evaluation
    if not questions:
        return []
    budget, newline = settings.mcq_max_new_tokens, config.prompt.newline_after_think
    check_context(model.config, tokenizer, list_prompts(config), budget, 0, "evaluation.mcq_max_new_tokens")
    asked = [
        Asked(key, prompt(question, newline), letters="".join(question["options"])) for key, (_, question) in questions.items()
    ]
    generation = config.generation.model_copy(update={"max_new_tokens": budget})
    closing = None if settings.answer_tokens is None else 0
    answers = answer_prompts(model, tokenizer, asked, generation, closing, journal, f"multiple choice, {label}", others)
    records: dict[str, _KeptAnswer] = {record["id"]: record for record in answers}
    most = _CPU_BATCH if model.device.type == "cpu" else _GPU_BATCH
    batch_size = most if generation.batch_size == "auto" else min(generation.batch_size, most)
    _read_likeliest(model, tokenizer, questions, records, batch_size, label, journal)
    return [_mcq_answer(label, task, question, records[key]) for key, (task, question) in questions.items()]


def _mcq_answer(label: str, task: str, question: McqQuestion, record: _KeptAnswer) -> McqAnswer:
    read = read_answer(record["completion"], question["options"])
    answer: McqAnswer = {
        "model": label,
        "task": Path(task).name,
        **question,
        "completion": record["completion"],
        "read": read,
        "correct": read == question["answer"],
        "abstained": read is None,
        "likelihood": record["likelihood"],
    }
    if "forced" in record:
        answer["closed_by"] = record["forced"]["closed_by"]
    if "letter" in record:
        answer["letter"] = record["letter"]
    return answer


def _read_likeliest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, tuple[str, McqQuestion]],
    records: dict[str, _KeptAnswer],
    batch_size: int,
    label: str,
    journal: Journal | None,
) -> None:
    """Add `letter` and `likelihood` to the records that lack them. A batch that is too large for the GPU is made smaller."""
    from accelerate.utils.memory import find_executable_batch_size
    from tqdm.auto import tqdm

    harness = make_harness(model, tokenizer, batch_size)
    thoughts = {key: thought for key, record in records.items() if (thought := _unread_thought(record))}
    by_letter = {key: letter_row(questions[key][1], thought) for key, thought in thoughts.items()}
    # A text with broken characters can have more tokens than the model wrote.
    by_letter = {key: row for key, row in by_letter.items() if fits(harness, row)}
    if too_long := len(thoughts) - len(by_letter):
        say(f"{too_long} answers are too long to append `Answer:`, so they have no letter")
    by_text = {key: text_row(question) for key, (_, question) in questions.items()}
    readings: tuple[tuple[Literal["letter", "likelihood"], dict[str, OptionRow]], ...]
    readings = (("letter", by_letter), ("likelihood", by_text))

    @find_executable_batch_size(starting_batch_size=batch_size)
    def read_missing(size: int, bar: tqdm) -> None:
        harness = make_harness(model, tokenizer, size)
        for name, rows in readings:
            for keys in _chunks([*rows]):
                if all(name in records[key] for key in keys):
                    continue
                if journal:
                    journal.require_time(f"{name}, {label}", sum(name in records[key] for key in rows), len(rows))
                letters = likeliest_letters(harness, [rows[key] for key in keys], by_length=name == "likelihood")
                for key, letter in zip(keys, letters, strict=True):
                    records[key] = {**records[key], name: letter}
                if journal:
                    journal.add([records[key] for key in keys])
                bar.update(len(keys))

    kept = sum(name in records[key] for name, rows in readings for key in rows)
    about = f"likeliest options, {label} ({len(by_letter)} letters, {len(by_text)} texts)"
    with tqdm(total=len(by_letter) + len(by_text), initial=kept, desc=about, unit="reading") as bar:
        read_missing(bar)


def _unread_thought(record: _KeptAnswer) -> str | None:
    """Return the prompt and the closed thinking, whether the model closed it or it was closed for the model.

    Return None if the thinking was never closed, or if the letter was read when it was closed for the model."""
    if record["closed"] == 0 and ("forced" not in record or "letter" in record):
        return None
    return f"{record['prompt']}{record['completion'].partition('</think>')[0].rstrip()}{CLOSING}"


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + _KEPT_AT_ONCE] for start in range(0, len(keys), _KEPT_AT_ONCE))
