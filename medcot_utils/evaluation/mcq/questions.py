"""Multiple-choice questions, read from the shipped file, a local file, or the Hub, and checked."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.data.cells import as_text, is_whole
from medcot_utils.data.files import check_size
from medcot_utils.data.hub import find_files
from medcot_utils.errors import MedcotError, quote
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import SHIPPED_MCQ
from medcot_utils.text_files import decode, parse_json


class McqError(MedcotError):
    """Say why questions cannot be used or asked: the task, file, or row, what was expected, and what to do."""


class McqQuestion(TypedDict):
    """Hold a multiple-choice question, whatever its source."""

    id: str  # the row's, or row-N
    question: str
    options: dict[str, str]  # {letter from A on: its text}
    answer: str  # the correct letter
    specialty: str  # "" if the source names none


# A row as its source has it; `_question` checks columns and types.
Row = Mapping[str, Any]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence prints, progress bars, warnings, and log lines below ERROR inside the block. Exceptions pass through."""
    # The sink is never closed, because a log handler created inside the block keeps it.
    before, sink = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sink), redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# Convert rows of the Hub's data sets to the usual shape. The columns are those that lm-eval's own tasks read; for PubMedQA,
# those of its data card.
SHAPES: dict[str, Callable[[Row], Row]] = {
    "usual": dict,
    "medqa": lambda row: {
        "id": row["id"],
        "question": f"{row['sent1']} {row['sent2']}",
        "options": [row[f"ending{i}"] for i in range(4)],
        "answer": row["label"],
    },
    "medmcqa": lambda row: (
        row | {"options": [row[f"op{letter}"] for letter in "abcd"], "answer": row["cop"], "specialty": row["subject_name"]}
    ),
    "pubmedqa": lambda row: {
        "id": row["pubid"],
        "question": "\n".join([*row["context"]["contexts"], "", row["question"]]),
        "options": ["yes", "no", "maybe"],
        "answer": row["final_decision"],
    },
}


def read_questions(path: str, name: str | None = None, split: str | None = None, shape: str = "usual") -> list[McqQuestion]:
    """Read all questions of a source.

    Args:
        path: `shipped`, a .jsonl file, or a data set for `datasets.load_dataset`, which also takes `name` and `split`.
        shape: a key of SHAPES, which says which columns the rows have.

    Raises:
        McqError: as `run.load_questions` does."""
    local = path == "shipped" or path.endswith(".jsonl")
    rows = _read_lines(SHIPPED_MCQ if path == "shipped" else Path(path)) if local else _download(path, name, split)
    questions: dict[str, McqQuestion] = {}
    left_out = 0
    for number, row in enumerate(rows, 1):
        try:
            question = _question(SHAPES[shape](row), number)
        except (KeyError, TypeError, IndexError) as error:  # a data set on the Hub has changed its columns
            raise McqError(
                f"{path}, row {number}: its columns are not those of {shape} ({type(error).__name__}: {error}); it has "
                f"{', '.join(row)}. Give a local .jsonl file"
            ) from error
        except McqError as error:
            if local:
                raise McqError(f"{path}, row {number}: {error}") from None
            left_out += 1  # the user cannot fix a data set on the Hub
            continue
        if question["id"] in questions:
            raise McqError(f"{path}, row {number}: the id {quote(question['id'])} occurs twice; ids tell answers apart")
        questions[question["id"]] = question
    if not questions:
        raise McqError(f"{path}: no usable question among {len(rows)} rows")
    if left_out:
        say(f"{path}: {left_out} of {len(rows)} rows left out: an empty option, equal options, or an answer that is no option")
    return list(questions.values())


def choose(questions: Sequence[McqQuestion], limit: int | None, seed: int) -> list[McqQuestion]:
    """Choose `limit` questions (None: all), in their own order, every specialty with its share; the same for the same seed.

    It is a systematic sample: questions are sorted by specialty, in random order within each, and every (n / limit)-th is
    taken. Each question is equally likely, so accuracy on the sample estimates accuracy on all."""
    if limit is None or limit >= len(questions):
        return list(questions)
    chance = random.Random(seed)
    order = sorted(range(len(questions)), key=lambda i: (questions[i]["specialty"], chance.random()))
    start = chance.random()
    return [questions[i] for i in sorted(order[int((k + start) * len(order) / limit)] for k in range(limit))]


def _read_lines(path: Path) -> list[Row]:
    if not path.is_file():
        raise McqError(f"{path}: no such file")
    try:
        check_size(path.stat().st_size)
        text = decode(path.read_bytes())
    except ValueError as error:
        raise McqError(f"{path}: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removeprefix("\ufeff")  # a byte order mark, also in the middle of files that were concatenated
        try:
            rows += [dict(parse_json(line))] if line.strip() else []
        except (ValueError, TypeError) as error:
            raise McqError(f"{path}, line {number}: expected a JSON object ({error})") from error
    return rows


def _download(path: str, name: str | None, split: str | None) -> Sequence[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with quiet():  # the Hub's client logs every retry
            find_files(path, name)
            return load_dataset(path, name, split=split, trust_remote_code=False)
    # In this order: no network or no such data set; a loading script; no such split; rows of mixed types.
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        line = f"{path} could not be loaded from the Hub ({reason}): check the network, or give a local .jsonl file"
        raise McqError(line) from error


def _question(row: Row, number: int) -> McqQuestion:
    answer = row["answer_idx"] if row.get("answer_idx") is not None else row.get("answer")
    for column, value in {"question": row.get("question"), "options": row.get("options"), "answer": answer}.items():
        if value in (None, "", [], {}) or value != value:  # NaN
            raise McqError(f"no {column}; expected question, options and answer_idx or answer (it has {', '.join(row)})")
    options = _options(row["options"])
    texts = {column: _text(column, row.get(column)) for column in ("id", "question", "specialty")}
    if broken := [name for name, text in (texts | options).items() if not is_whole(text)]:
        raise McqError(f"{broken[0]} holds half a character: the text was cut inside it")
    right = _right_letter(answer, options)
    _check_distinct(options, right)
    return {
        "id": str(row["id"]) if texts["id"] else f"row-{number}",
        "question": texts["question"].strip(),
        "options": options,
        "answer": right,
        "specialty": texts["specialty"],
    }


def _text(column: str, value: Any) -> str:
    try:
        return as_text(value)
    except ValueError as error:
        raise McqError(f"the {column} {error}") from None


def _options(given: Any) -> dict[str, str]:
    if not isinstance(given, dict | list):
        raise McqError(f"options are {quote(given)}; expected a list, or an object of letters and texts")
    if len(given) > len(ascii_uppercase):
        raise McqError(f"there are {len(given)} options; expected at most {len(ascii_uppercase)}, one for each letter")
    named = given if isinstance(given, dict) else dict(zip(ascii_uppercase, given, strict=False))
    if "".join(sorted(named)).upper() != ascii_uppercase[: len(named)]:
        raise McqError(f"options are named {', '.join(named)}; expected consecutive letters that begin with A")
    for letter, text in named.items():
        missing = text in ("", None) or text != text  # NaN
        if missing or not isinstance(text, str | int | float) or not str(text).strip():
            raise McqError(f"option {letter} is {'empty' if missing else quote(text)}; expected a text for every option")
    return {letter.upper(): str(named[letter]).strip() for letter in sorted(named)}


def _right_letter(answer: Any, options: dict[str, str]) -> str:
    """Return the letter of an answer that is given as a letter, an index from 0, or an option's text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        letters = [*options][answer : answer + 1] if answer >= 0 else []
    else:
        letters = [str(answer).strip().upper()] if str(answer).strip().upper() in options else []
        letters = letters or [letter for letter, text in options.items() if text == str(answer).strip()]
    if not letters:
        known = ", ".join(options)
        raise McqError(f"the answer {quote(answer)} is not an option; expected {known}, an index from 0, or an option's text")
    return letters[0]


def _check_distinct(options: dict[str, str], right: str) -> None:
    """Raise McqError if the options do not differ, or if another one has the text of the right one."""
    texts = {letter: " ".join(text.split()) for letter, text in options.items()}
    # Short texts may differ only in case, as the genotypes AA, Aa, and aa do.
    if len({text.casefold() if len(text) > 3 else text for text in texts.values()}) == 1:
        raise McqError(f"every option reads {quote(texts[right])}; expected at least two that differ")
    same = [letter for letter, text in texts.items() if text == texts[right]]
    if len(same) > 1:
        raise McqError(
            f"options {' and '.join(same)} both read {quote(texts[right])}, and {right} is the right one; no reading can "
            "distinguish them. Expected different texts"
        )
