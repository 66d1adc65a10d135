"""The work of a configuration in numbers: parameters, tokens to train on and to read, answers and their token budgets, bytes.

These are known before a model is loaded, or even downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from medcot_utils.config import RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.machine import disk
from medcot_utils.run.artifacts import SHIPPED_MCQ
from medcot_utils.training.batch_plan import step_plan

# Characters of English text that one token holds on average, with a vocabulary of 50,000 or more.
_CHARACTERS_PER_TOKEN = 4.3
# The mean tokens of a row of the article's data with Llama 3's tokenizer, and the number of rows of its pinned revision.
_ARTICLE_TOKENS, _ARTICLE_ROWS = 769, 19_704
_CLOSING_TOKENS = 10  # tokens of forced closing, and of the letter that is asked for
# A tuned model's answers are as long as those of its training rows. A batch waits for its longest answer, which is longer than
# the mean.
_LONGEST_ANSWER = 1.1
_OPTIONS = 4  # options of a multiple-choice question
_OPTION_TOKENS = {"shipped": 60}  # tokens that are read for one option: the question and the option's text
_LONGER_OPTION_TOKENS = 200  # the same for other tasks, whose questions are cases
# The number of questions of the tasks that need a download; see evaluation/mcq/*.yaml.
_TASK_QUESTIONS = {"medqa": 1273, "medmcqa": 4183, "pubmedqa": 1000}


@dataclass(frozen=True)
class ModelSize:
    """Hold the size of a base model."""

    parameters: float
    layers: int
    cache_bytes: float  # keys and values of one token, in 16 bits
    base_bytes: float  # the weights in the form that notebooks 02 to 06 load
    in_4bit: bool


@dataclass(frozen=True)
class Asked:
    """Hold answers that are generated together."""

    answers: int
    new_tokens: int  # the most tokens that each may get


@dataclass(frozen=True)
class Workload:
    """Hold the work of the seven notebooks with a configuration."""

    model: ModelSize
    row_tokens: float  # mean of a row
    prompt_tokens: float  # mean of a question's prompt
    train_rows: int  # training rows that notebook 03 prepares
    steps: int  # optimizer steps
    step_rows: int
    evaluated_rows: int  # held-out rows, summed over all evaluations during training
    held_out_rows: int
    asked: Asked  # held-out questions in notebook 02
    asked_tuned: Asked  # held-out questions in notebook 06
    asked_mcq: Asked
    asked_merged: Asked
    option_tokens: float  # tokens that one model reads for the likelihoods of multiple choice
    check_tokens: int  # tokens that are written one at a time when the merged model is checked


# {model: (layers, bytes of keys and values per token, number of weights outside the decoder's projections, such as embeddings)}
_SHAPES = {
    "unsloth/DeepSeek-R1-Distill-Llama-8B": (32, 131_072, 1.05e9),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (28, 28_672, 0.467e9),
    "embedded:smollm2-135m-instruct": (30, 23_040, 0.0),
    "embedded:tiny-random-llama": (2, 1024, 0.0),
}


def measure_model(config: RunConfig) -> ModelSize | None:
    """Return the size of the base; None if it is unknown before the download.

    For a model outside the profiles, only the number of parameters is known. The rest is that of a Llama with as many."""
    parameters, _ = disk.model_sizes(config)
    if parameters is None:
        return None
    scale = (parameters / 8.03e9) ** (1 / 3)
    known = _SHAPES.get(config.model.name, (round(32 * scale), 131_072 * scale * scale, 0.13 * parameters))
    layers, cache_bytes, outside = known
    in_4bit = config.model.load_in_4bit
    base = 0.56 * (parameters - outside) + 2 * outside if in_4bit else 2 * parameters
    return ModelSize(parameters, layers, cache_bytes, base, in_4bit)


def measure_workload(config: RunConfig, online: bool = False) -> Workload | None:
    """Return the work of a configuration; None if its model's size is unknown.

    Rows are loaded and measured if they are here or, on the Hub, if `online` is true. If not, they count as the article's rows.
    Raises DataError as `load_rows` does."""
    model = measure_model(config)
    if model is None:
        return None
    settings, t = config.evaluation, config.training
    rows, row_tokens, prompt_tokens = _measure_rows(config, online)
    held_out = min(config.dataset.held_out_rows, rows)
    train_rows = min(config.dataset.num_rows or rows, rows - held_out)
    steps = step_plan(config, train_rows)["steps"]
    evaluations = steps // t.eval_steps if t.eval_steps else 0
    forced = None if settings.answer_tokens is None else settings.answer_tokens + _CLOSING_TOKENS
    questions, mcq = settings.num_questions + 1, _count_mcq(config)
    per_answer = config.generation.max_new_tokens + (forced or 0)
    merged = questions if settings.merged_questions is None else settings.merged_questions
    per_tuned = min(per_answer, math.ceil(_LONGEST_ANSWER * (row_tokens - prompt_tokens)))
    return Workload(
        model=model,
        row_tokens=min(row_tokens, config.model.max_seq_length),
        prompt_tokens=prompt_tokens,
        train_rows=train_rows,
        steps=steps,
        step_rows=t.effective_batch_size,
        evaluated_rows=evaluations * min(t.eval_rows, held_out),
        held_out_rows=held_out,
        asked=Asked(questions * (settings.n_samples + 1), per_answer),
        asked_tuned=Asked(questions * (settings.n_samples + 1), per_tuned),
        asked_mcq=Asked(sum(mcq.values()), settings.mcq_max_new_tokens + (0 if forced is None else _CLOSING_TOKENS)),
        asked_merged=Asked(merged if settings.measure_merged else 0, per_tuned),
        option_tokens=sum(n * _OPTIONS * _OPTION_TOKENS.get(task, _LONGER_OPTION_TOKENS) for task, n in mcq.items()),
        check_tokens=2 * config.export.check_prompts * config.export.check_new_tokens,
    )


def _measure_rows(config: RunConfig, online: bool) -> tuple[int, float, float]:
    """Return (rows, mean tokens of a row, mean tokens of a prompt)."""
    template = len(inference_prompt("")) / _CHARACTERS_PER_TOKEN
    path = config.dataset.path
    here = Path(path).expanduser().is_file() if path else online or config.dataset.name == "shipped"
    if not here:
        return _ARTICLE_ROWS, _ARTICLE_TOKENS, template + 45
    from medcot_utils.data.rows import load_rows, validate_rows

    rows, _ = validate_rows(load_rows(config.dataset))
    questions = [len(row["Question"]) / _CHARACTERS_PER_TOKEN for row in rows]
    texts = [(len(row["Complex_CoT"]) + len(row["Response"])) / _CHARACTERS_PER_TOKEN for row in rows]
    prompt = template + mean(questions)
    return len(rows), prompt + mean(texts), prompt


def _count_mcq(config: RunConfig) -> dict[str, int]:
    limit = config.evaluation.mcq_limit or math.inf
    return {task: int(min(limit, _TASK_QUESTIONS.get(task) or _count_lines(task))) for task in config.evaluation.mcq_tasks}


def _count_lines(task: str) -> int:
    path = SHIPPED_MCQ if task == "shipped" else Path(task).expanduser()
    return path.read_bytes().count(b"\n") if path.is_file() else 0
