"""Find evaluation questions that training rows repeat: exactly, nearly, or in pieces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.plain_text import say

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from datasets import Dataset

    from medcot_utils.config import DatasetSettings
    from medcot_utils.data.rows import AskedQuestion
    from medcot_utils.data.tokens import DataReport

# Words in a sequence. Language-model papers look for 8 (PaLM) to 13 (GPT-3); a question here has 34 on average.
NGRAM_WORDS = 8
# Chinese and Japanese put no spaces between words: there a character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
_MARKS_IN_A_ROW = 30
# The similarity of two texts takes time in the product of their lengths: 0.2 ms for so many characters, 15 ms for 20,000.
MAX_COMPARED_CHARACTERS = 2000
TEXTS = ("Question", "Complex_CoT", "Response")


class Repeat(TypedDict):
    """Hold one training row that repeats one evaluation question.

    `similarity`: rapidfuzz's normalized Indel similarity of the two questions, 0 to 100. `overlap`: the share of the
    question's 8-word sequences found anywhere in the row, 0 to 1. `exact`: the two are equal after `normalize`."""

    train_id: str
    question_id: str
    question: NotRequired[str]  # runs of 0.2.0 lack it
    train_question: str
    similarity: float
    overlap: float
    exact: bool


def normalize(text: str) -> str:
    """Return the form in which questions are compared: lower case, letters and digits of any script, single spaces.

    Unicode's NFKC form makes an accent that is written apart the same letter."""
    characters = unicodedata.normalize("NFKC", _break_runs_of_marks(text.lower()))
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in characters).split())


def _break_runs_of_marks(text: str) -> str:
    """Return the text with U+034F after every 30 combining marks in a row, without which normalizing takes quadratic time.

    Source: the Stream-Safe Text Process of Unicode Standard Annex 15."""
    if text.isascii():
        return text
    parts, run = [], 0
    for character in text:
        run = run + 1 if _is_mark(character) else 0
        if run > _MARKS_IN_A_ROW:
            parts.append("\u034f")
            run = 1
        parts.append(character)
    return "".join(parts)


@cache
def _is_mark(character: str) -> bool:
    return unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) != 0


def find_repeats(train: Dataset, questions: Sequence[AskedQuestion], settings: DatasetSettings) -> list[Repeat]:
    """Return the pairs of a training row and an evaluation question that it repeats.

    A pair counts from a similarity of `near_repeat_similarity`, or from an overlap of `ngram_overlap`. The overlap looks at
    the row's question, chain of thought and response: it also finds a question that was lengthened or moved into an
    answer. The similarity is that of the first MAX_COMPARED_CHARACTERS, and a line says so if a text is longer."""
    from rapidfuzz import fuzz, process

    train_questions = train["Question"][:]
    ours = [normalize(text) for text in train_questions]
    theirs = [normalize(question["Question"]) for question in questions]
    if longer := sum(len(text) > MAX_COMPARED_CHARACTERS for text in [*theirs, *ours]):
        say(
            f"{longer} questions are longer than {MAX_COMPARED_CHARACTERS:,} characters (MAX_COMPARED_CHARACTERS): similarity "
            f"compares only their beginnings; 8-word sequences are compared in full"
        )
    begin_ours, begin_theirs = ([text[:MAX_COMPARED_CHARACTERS] for text in texts] for texts in (ours, theirs))
    scores = process.cdist(begin_theirs, begin_ours, scorer=fuzz.ratio, score_cutoff=settings.near_repeat_similarity, workers=-1)
    columns = [name for name in TEXTS if name in train.column_names]
    overlaps = _overlaps(theirs, [" ".join(normalize(row[name]) for name in columns) for row in train])
    ids = train["id"]
    found = []
    for i, j in zip(*((scores > 0) | (overlaps >= settings.ngram_overlap)).nonzero(), strict=True):
        found.append(
            Repeat(
                train_id=str(ids[j]),
                question_id=str(questions[i]["id"]),
                question=questions[i]["Question"],
                train_question=train_questions[j],
                similarity=round(float(scores[i, j]) or fuzz.ratio(begin_theirs[i], begin_ours[j]), 1),
                overlap=round(float(overlaps[i, j]), 2),
                exact=theirs[i] == ours[j],
            )
        )
    return found


def tabulate_repeats(repeats: Sequence[Repeat], questions: Sequence[AskedQuestion]) -> pd.DataFrame:
    """Return one line per repeat: the question beside the training row's, and how similar they are."""
    import pandas as pd

    texts = {str(question["id"]): question["Question"] for question in questions}
    lines = [
        {
            "question": f"{repeat['question_id']}: {texts[repeat['question_id']]}",
            "training row": f"{repeat['train_id']}: {repeat['train_question']}",
            "similarity": repeat["similarity"],
            "8-word overlap": repeat["overlap"],
            "exact": repeat["exact"],
        }
        for repeat in repeats
    ]
    return pd.DataFrame(lines, columns=["question", "training row", "similarity", "8-word overlap", "exact"])


def _overlaps(questions: list[str], rows: list[str]) -> np.ndarray:
    """Return the share of each question's word sequences in each row, shape (questions, rows); 0 for a shorter question."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    def sequences(text: str) -> list[str]:
        words = _WORD.findall(text)
        return [" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]

    vocabulary = sorted({sequence for question in questions for sequence in sequences(question)})
    if not vocabulary:
        return np.zeros((len(questions), len(rows)))
    # Only the questions' own sequences are counted, so that tens of thousands of rows need no memory to speak of.
    vectorizer = CountVectorizer(analyzer=sequences, vocabulary=vocabulary, binary=True)
    asked, held = vectorizer.transform(questions).astype(float), vectorizer.transform(rows).astype(float)
    totals = np.maximum(asked.sum(axis=1), 1)
    return np.asarray((asked @ held.T).todense()) / np.asarray(totals).reshape(-1, 1)


def contaminated(data_report: DataReport) -> set[str]:
    """Return the ids, as text, of the questions and held-out rows that a row in training repeats.

    There are none if such rows were dropped."""
    return set() if data_report["repeats_dropped"] else {str(repeat["question_id"]) for repeat in data_report["repeats"]}
