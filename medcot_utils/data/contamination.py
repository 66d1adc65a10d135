"""Evaluation questions that training rows repeat: exactly, nearly, or in pieces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from medcot_utils.config import DatasetSettings

# Words in a sequence. Language-model papers look for 8 (PaLM) to 13 (GPT-3); a question here has 34 on average.
NGRAM_WORDS = 8
# Chinese and Japanese put no spaces between words: there a character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
TEXTS = ("Question", "Complex_CoT", "Response")


def normalize(text: str) -> str:
    """Lower case, letters with their marks and digits (of any script) only, single spaces: what two questions are compared
    by. Unicode's NFKC form, so that an accent written apart is the same letter."""
    characters = unicodedata.normalize("NFKC", text.lower())
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in characters).split())


def find_repeats(train: Dataset, questions: Sequence[dict[str, Any]], settings: DatasetSettings) -> list[dict[str, Any]]:
    """Training rows that repeat an evaluation question. One record per pair: train_id, question_id, train_question,
    similarity, overlap, exact.

    similarity: rapidfuzz's normalized Indel similarity of the two questions, 0 to 100, found from
    `near_repeat_similarity` on; exact: equal after `normalize`. overlap: the share of the question's 8-word sequences that
    stand anywhere in the row (question, chain of thought or response), found from `ngram_overlap` on: so a question that
    was lengthened, or moved into an answer, is found too."""
    from rapidfuzz import fuzz, process

    ours = [normalize(text) for text in train["Question"]]
    theirs = [normalize(question["Question"]) for question in questions]
    scores = process.cdist(theirs, ours, scorer=fuzz.ratio, score_cutoff=settings.near_repeat_similarity, workers=-1)
    columns = [name for name in TEXTS if name in train.column_names]
    overlaps = _overlaps(theirs, [" ".join(normalize(row[name]) for name in columns) for row in train])
    ids = train["id"]
    found = []
    for i, j in zip(*((scores > 0) | (overlaps >= settings.ngram_overlap)).nonzero(), strict=True):
        similarity = float(scores[i, j]) or fuzz.ratio(theirs[i], ours[j])
        record = {"train_id": str(ids[j]), "question_id": str(questions[i]["id"]), "train_question": train[int(j)]["Question"]}
        shares = {"similarity": round(similarity, 1), "overlap": round(float(overlaps[i, j]), 2)}
        found.append(record | shares | {"exact": theirs[i] == ours[j]})
    return found


def repeats_table(repeats: Sequence[dict[str, Any]], questions: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What `find_repeats` found, a line each: the question beside the training row's, and how alike they are."""
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


def _overlaps(questions: list[str], rows: list[str]) -> Any:
    """(questions, rows): the share of each question's word sequences that each row holds; 0 for a shorter question."""
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


def contaminated(data_report: dict[str, Any]) -> set[str]:
    """The ids, as text, of questions and held-out rows that a row the model was trained on repeats: none where such rows
    were dropped."""
    return set() if data_report["repeats_dropped"] else {str(repeat["question_id"]) for repeat in data_report["repeats"]}
