"""What is measured of one answer: form, style, repetition, and likeness to a reference text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medcot_utils.errors import MedcotError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class MeasureError(MedcotError):
    """A metric that was asked for cannot be taken here; the message says what it lacks."""


@dataclass(frozen=True)
class Measure:
    """A metric's words: what it says, its unit, which way is better (+1, -1, 0 for neither), and whether each question
    gives a yes or no, which an exact test can then judge."""

    text: str
    unit: str
    better: Literal[-1, 0, 1]
    yes_or_no: bool = False

    @property
    def label(self) -> str:
        """`length of the answer (words)`"""
        return f"{self.text} ({self.unit})" if self.unit else self.text


METRICS: dict[str, Measure] = {
    "eval_loss": Measure("held-out loss, per trained token", "nats", -1),
    "perplexity": Measure("held-out perplexity", "", -1),
    "closed_think_rate": Measure("thinking closed once, text on both sides", "share", 1, yes_or_no=True),
    "finished_rate": Measure("answers that end by themselves", "share", 1, yes_or_no=True),
    "answered_rate": Measure("answers with text after the thinking", "share", 1, yes_or_no=True),
    "thinking_tokens": Measure("length of the thinking", "tokens", 0),
    "thinking_words": Measure("length of the thinking", "words", 0),
    "answer_tokens": Measure("length of the answer", "tokens", 0),
    "answer_words": Measure("length of the answer", "words", 0),
    "completion_words": Measure("length of everything written", "words", 0),
    "bullet_rate": Measure("answers written as a list", "share", 0, yes_or_no=True),
    "one_paragraph_rate": Measure("answers of exactly one paragraph, no list", "share", 0, yes_or_no=True),
    "repetition": Measure("4-word sequences that came before in the same text", "share", -1),
    "rouge_l": Measure("ROUGE-L of the answer against the reference", "F1", 1),
    "chrf": Measure("chrF of the answer against the reference", "0 to 1", 1),
    "embedding_similarity": Measure("likeness of meaning to the reference, by evaluation.embedding_model", "cosine", 1),
    "mcq_accuracy": Measure("multiple-choice questions answered rightly", "share", 1, yes_or_no=True),
    "mcq_abstained": Measure("multiple-choice questions without a readable answer", "share", -1, yes_or_no=True),
    "mcq_accuracy_answered": Measure(
        "questions answered rightly, of those that both models answered", "share", 1, yes_or_no=True
    ),
}
# A model that never closes its tag has no answer: its style is read off what it wrote last, which is its thinking.

_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_REPEATED_WORDS = 4


def is_bullet_list(text: str) -> bool:
    """Two or more lines that begin with a bullet or a number: what the article says the base model does."""
    return len(_BULLET.findall(text)) >= 2


def paragraphs(text: str) -> int:
    """Blocks of text between blank lines."""
    return len([block for block in re.split(r"\n\s*\n", text) if block.strip()])


def repetition(text: str) -> float:
    """The share of 4-word sequences that stood in the text before; 0 for a shorter text. A loop comes near 1."""
    words = text.lower().split()
    sequences = [tuple(words[i : i + _REPEATED_WORDS]) for i in range(len(words) - _REPEATED_WORDS + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 (rouge-score, with stemming) of an answer against the reference response; 0 for an empty answer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure


def chrf(answer: str, reference: str) -> float:
    """chrF2 (sacrebleu, character 6-grams; Popović 2015), 0 to 1, of an answer against the reference; 0 for an empty one."""
    from sacrebleu import sentence_chrf

    return sentence_chrf(answer, [reference]).score / 100


def measure(record: dict[str, Any], reference: str) -> dict[str, float]:
    """Every metric of one generation record (see `generation.answer_questions`) but the losses."""
    answer, thinking = record["answer"], record["thinking"]
    written = answer or thinking
    return {
        # Well formed: closed exactly once with text on both sides; a bare or doubled tag is no closed reasoning.
        "closed_think_rate": float(record["well_formed"]),
        "finished_rate": float(record["finished"]),
        "answered_rate": float(bool(answer.strip())),
        "thinking_tokens": float(record["thinking_tokens"]),
        "thinking_words": float(len(thinking.split())),
        "answer_tokens": float(record["answer_tokens"]),
        "answer_words": float(len(answer.split())),
        "completion_words": float(len(thinking.split()) + len(answer.split())),
        "bullet_rate": float(is_bullet_list(written)),
        "one_paragraph_rate": float(paragraphs(written) == 1 and not is_bullet_list(written)),
        "repetition": repetition(f"{thinking} {answer}"),
        "rouge_l": rouge_l(answer, reference),
        "chrf": chrf(answer, reference),
    }


def answer_columns(
    records: Sequence[dict[str, Any]], references: Sequence[str], embedding_model: str | None = None
) -> dict[str, np.ndarray]:
    """One column per metric over the questions, from generation records and the reference responses beside them; with an
    embedding model, `embedding_similarity` too."""
    values = [measure(record, reference) for record, reference in zip(records, references, strict=True)]
    columns = {name: np.array([row[name] for row in values], dtype=float) for name in values[0]}
    if embedding_model is not None:
        answers = [record["answer"] for record in records]
        columns["embedding_similarity"] = embedding_similarity(answers, references, embedding_model)
    return columns


def embedding_similarity(answers: Sequence[str], references: Sequence[str], name: str) -> np.ndarray:
    """Cosine of each answer's sentence embedding and its reference's (sentence-transformers); 0 for an empty answer.

    Likeness of meaning as that model sees it, which takes a denial for nearly the same as what it denies. Raises
    MeasureError as `embedder` does."""
    model = embedder(name)
    ours, theirs = (
        model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False) for texts in (answers, references)
    )
    return np.where([bool(answer.strip()) for answer in answers], (ours * theirs).sum(axis=1), 0.0).astype(float)


@cache
def embedder(name: str) -> SentenceTransformer:
    """The sentence embedding model of this folder or Hub id. Raises MeasureError if it or its library is not to be had."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MeasureError("evaluation.embedding_model needs a library more: pip install sentence-transformers") from error
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise MeasureError(f"evaluation.embedding_model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def sampled_columns(
    records: Sequence[Sequence[dict[str, Any]]], references: Sequence[str], embedding_model: str | None = None
) -> dict[str, np.ndarray]:
    """As `answer_columns`, with each question's mean over its samples: `records` holds one sequence per sample, the
    questions in the same order in each. The questions stay what is resampled."""
    columns = [answer_columns(sample, references, embedding_model) for sample in records]
    return {name: np.mean([column[name] for column in columns], axis=0) for name in columns[0]}
