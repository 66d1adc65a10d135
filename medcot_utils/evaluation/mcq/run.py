"""Ask multiple-choice questions through lm-evaluation-harness: with the project's own prompt, and read strictly.

An answer that cannot be read is counted as abstained, apart from wrong."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import yaml

from medcot_utils.config import RunConfig
from medcot_utils.data.prompts import inference_prompt, parse_completion
from medcot_utils.evaluation.mcq.questions import McqError, McqQuestion, quiet, read_questions
from medcot_utils.models.generation import NEUTRAL_ARGUMENTS

if TYPE_CHECKING:
    import torch
    from datasets import DatasetDict
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent
TASK_NAMES = ("shipped", "medqa", "medmcqa", "pubmedqa")

AUTO_BATCH = 16

ASK = 'End your response with one line of the form "Answer: X", where X is the letter of the right option.'


class TaskRow(TypedDict):
    """Hold a question as lm-eval's task reads it."""

    prompt: str
    options: list[str]  # in the order of their letters
    answer: str  # the right letter


class McqAnswer(McqQuestion):
    """Hold a question with one model's greedy answer, a line of base_mcq.jsonl or tuned_mcq.jsonl.

    Runs of earlier versions have the strict reading alone."""

    model: str  # base or tuned
    task: str  # a name of TASK_NAMES, or a file's name
    completion: str
    read: str | None  # the letter that was read, see `read_answer`
    correct: bool
    abstained: bool  # no letter could be read; never correct
    closed_by: NotRequired[Literal["itself", "budget", "end"]]  # what ended its thinking, as in `records.ForcedAnswer`
    letter: NotRequired[str]  # the likeliest letter after the thinking, closed by the model or for it
    likelihood: NotRequired[str]  # the letter of the option whose text is likeliest by length, without thinking


# --- the answer ----------------------------------------------------------------------------------------------------

_ASKED_LINE = re.compile(r"\s*answer\s*:(.*)", re.IGNORECASE)
_LETTER = re.compile(r"\s*\(?([a-z])\b(.*)", re.IGNORECASE)
_MARKUP = re.compile(r"[*_`#]")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # as Chinese and Japanese keyboards write ASCII


def read_answer(completion: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that a completion answers with, or None if none can be read: then the model abstained.

    Only the last line after the single `</think>` that begins with `Answer:` is read, whatever its case, Markdown emphasis and
    width of characters. After the colon stands an option's letter, alone or in brackets, and then nothing or that option's own
    text: not "B or C", nor "C. difficile". Thinking that was never closed, was closed twice or continues after the answer is not
    read, nor is any other wording, nor a letter that no option has.

    HuatuoGPT-o1's scorer, which most published numbers come from, counts first and last letters and reports the better total;
    without a letter it takes the most similar option. This one has one reading, fixed before the result is known."""
    answer = completion.partition("</think>")[2].translate(_FULL_WIDTH)
    if parse_completion(completion).closed != 1 or "<think>" in answer:
        return None
    lines = [found[1] for line in answer.splitlines() if (found := _ASKED_LINE.fullmatch(_MARKUP.sub("", line)))]
    found = _LETTER.fullmatch(lines[-1]) if lines else None
    if not found or found[1].upper() not in options:
        return None
    letter, rest = found[1].upper(), _bare(found[2])
    return letter if rest in ("", _bare(options[letter])) else None


def _bare(text: str) -> str:
    return " ".join(_MARKUP.sub("", text.translate(_FULL_WIDTH)).casefold().split()).strip(" .,:;()-。、")


def judge_row(doc: TaskRow, results: Sequence[str]) -> dict[str, int]:
    """Return correct and abstained, each 0 or 1, of a row of `task_rows` and its completion: lm-eval's `process_results`."""
    read = read_answer(results[0], dict(zip(ascii_uppercase, doc["options"], strict=False)))
    return {"correct": int(read == doc["answer"]), "abstained": int(read is None)}


# --- the questions -------------------------------------------------------------------------------------------------


def load_questions(task: str, limit: int | None = None, seed: int = 3407) -> list[McqQuestion]:
    """Return the questions of a task by name (`TASK_NAMES`) or of a local .jsonl file; `limit` of them by `choose`.

    If there are fewer than `limit`, all are taken and a line says so. A file's rows hold question; options as
    {letter: text} or a list; answer_idx, or else answer, as a letter, an index from 0 or the option's text; and optionally
    id and specialty. Raises McqError for an unknown task, a data set that cannot be reached, and a file whose rows lack a
    column, repeat an id, or have an empty option or an answer that is no option."""
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
        print(f"{task} has {len(questions)} questions, fewer than the {limit} asked for: all of them are asked")
    return choose(questions, limit, seed)


def choose(questions: Sequence[McqQuestion], limit: int | None, seed: int) -> list[McqQuestion]:
    """Choose `limit` questions (None: all) in their own order, every specialty with its share; the same for the same seed.

    It is a systematic sample: sorted by specialty, in random order within each, every (n / limit)-th is taken. Each question is
    equally likely, so accuracy on the sample estimates accuracy on all."""
    if limit is None or limit >= len(questions):
        return list(questions)
    chance = random.Random(seed)
    order = sorted(range(len(questions)), key=lambda i: (questions[i]["specialty"], chance.random()))
    start = chance.random()
    return [questions[i] for i in sorted(order[int((k + start) * len(order) / limit)] for k in range(limit))]


def task_rows(
    questions: Sequence[McqQuestion] | None = None,
    newline_after_think: bool = True,
    limit: int | None = None,
    seed: int = 3407,
    path: str = "shipped",
    name: str | None = None,
    split: str | None = None,
    shape: str = "usual",
    **_: Any,
) -> DatasetDict:
    """Return a task's rows (`TaskRow`), from questions already chosen or from the source in the task's file.

    It is lm-eval's `custom_dataset`; other arguments are lm-eval's own metadata."""
    from datasets import Dataset, DatasetDict

    chosen = choose(read_questions(path, name, split, shape), limit, seed) if questions is None else questions
    columns = {
        "prompt": [prompt(question, newline_after_think) for question in chosen],
        "options": [[*question["options"].values()] for question in chosen],  # not by letter: Arrow would give all rows all keys
        "answer": [question["answer"] for question in chosen],
    }
    return DatasetDict(test=Dataset.from_dict(columns))


def prompt(question: McqQuestion, newline_after_think: bool = True) -> str:
    """Return the project's inference prompt over the question, its options as lines, and the sentence that asks for the form."""
    options = "\n".join(f"{letter}. {text}" for letter, text in question["options"].items())
    return inference_prompt(f"{question['question']}\n\n{options}\n\n{ASK}", newline_after_think)


# --- the run -------------------------------------------------------------------------------------------------------


def run_mcq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    limit: int | None = None,
    max_new_tokens: int = 1200,
    batch_size: int = 8,
    newline_after_think: bool = True,
    seed: int = 3407,
    label: str = "model",
) -> list[McqAnswer]:
    """Answer every question of `load_questions` greedily; `label` says whose the answers are.

    lm-eval's simple_evaluate runs over the loaded model, with the tasks of this package; it needs no network except for a
    data set from the Hub. Raises McqError as `load_questions` does, and if question and new tokens exceed the model's
    context: lm-eval would cut the question's beginning without a word."""
    from tqdm.auto import tqdm

    questions = load_questions(task, limit, seed)
    longest = max(len(tokenizer(prompt(question, newline_after_think))["input_ids"]) for question in questions)
    with tqdm(total=len(questions), desc=f"multiple choice, {label}", unit="answer") as bar, quiet():
        harness = _harness_model(model, tokenizer, batch_size, bar)
        if longest + max_new_tokens > harness.max_length:
            raise McqError(
                f"the longest question of {task} takes {longest} tokens: with max_new_tokens ({max_new_tokens}) more than the "
                f"model's {harness.max_length}. Lower max_new_tokens"
            )
        name = f"medcot_{task}" if task in TASK_NAMES else "medcot_file"
        metadata = {"questions": questions, "newline_after_think": newline_after_think}
        samples = _evaluate(harness, name, metadata, max_new_tokens, tokenizer.eos_token_id)
    return [
        {
            "model": label,
            "task": Path(task).name,
            **question,
            "completion": sample["resps"][0][0],
            "read": read_answer(sample["resps"][0][0], question["options"]),
            "correct": bool(sample["correct"]),
            "abstained": bool(sample["abstained"]),
        }
        for question, sample in zip(questions, samples, strict=True)
    ]


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, label: str) -> list[McqAnswer]:
    """Answer the questions of every task of `evaluation.mcq_tasks` with `run_mcq`, with a run's settings."""
    settings, batch_size = config.evaluation, config.generation.batch_size
    records = []
    for task in settings.mcq_tasks:
        records += run_mcq(
            model,
            tokenizer,
            task,
            limit=settings.mcq_limit,
            max_new_tokens=settings.mcq_max_new_tokens,
            batch_size=AUTO_BATCH if batch_size == "auto" else batch_size,
            newline_after_think=config.prompt.newline_after_think,
            seed=config.seed,
            label=label,
        )
    return records


def _evaluate(harness: HFLM, name: str, metadata: dict[str, Any], max_new_tokens: int, eos_token_id: int) -> list[dict[str, Any]]:
    """Return lm-eval's samples of one task, in the order of its rows."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    # It would ask git for this folder's commit, which complains on the terminal where there is no repository.
    evaluator.get_git_commit_hash = lambda: None
    results = evaluator.simple_evaluate(
        harness,
        tasks=[name],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata),
        # A model's own generation_config may name another EOS, or sample; `_harness_model` keeps out what else it may set.
        gen_kwargs={"max_gen_toks": max_new_tokens, "do_sample": False, "eos_token_id": eos_token_id},
        bootstrap_iters=0,
        log_samples=True,
        # Greedy answers draw nothing at random: the caller's generators are not seeded anew.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=None,
    )
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, bar: tqdm) -> HFLM:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size
    from lm_eval.models.huggingface import HFLM
    from torch.nn.utils.rnn import pad_sequence

    class CountedHFLM(HFLM):
        """Extend lm-eval's own by a progress bar that says whose answers these are, and halve a batch too large for the GPU."""

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sequences = self._generate_halving(context, args, kwargs)
            bar.update(len(context))
            return sequences

        def _generate_halving(self, context: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
            try:
                return super()._model_generate(context, *args, **(kwargs | NEUTRAL_ARGUMENTS))
            except RuntimeError as error:
                if len(context) == 1 or not should_reduce_batch_size(error):
                    raise
            torch.cuda.empty_cache()  # out of the except block: its traceback would keep the cache alive
            middle, mask = len(context) // 2, kwargs["attention_mask"]
            bar.set_postfix_str(f"out of memory: {len(context)} questions in two halves")
            rows = [
                row
                for part in (slice(middle), slice(middle, None))
                for row in self._generate_halving(context[part], args, kwargs | {"attention_mask": mask[part]})
            ]
            return pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)

    return CountedHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
