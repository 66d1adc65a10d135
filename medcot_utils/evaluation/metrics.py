"""The metrics of one answer: form, style, repetition, and similarity to a reference text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from medcot_utils.data.contamination import normalize
from medcot_utils.data.words import split_words
from medcot_utils.errors import MedcotError
from medcot_utils.evaluation.copied import remove_copied
from medcot_utils.models.records import thinking_is_cut
from medcot_utils.models.sentence_model import load_sentence_model
from medcot_utils.models.tokenizer import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from medcot_utils.data.rows import Question
    from medcot_utils.models.records import AnswerRecord


class MetricError(MedcotError):
    """Say why a requested metric cannot be measured here."""


@dataclass(frozen=True)
class Metric:
    """Hold how a metric is named and read.

    text: what it measures. unit: "" if it has none. better: the better direction; 0 if neither is better.
    yes_or_no: whether each question gives a yes or a no, which an exact test can judge."""

    text: str
    unit: str
    better: Literal[-1, 0, 1]
    yes_or_no: bool = False

    @property
    def from_0_to_1(self) -> bool:
        """Return whether the metric lies on a scale from 0 to 1, so that its differences are comparable with others."""
        return self.unit in ("share", "F1", "0 to 1", "cosine")

    @property
    def label(self) -> str:
        """Return text and unit, as in `length of the answer (words)`."""
        return f"{self.text} ({self.unit})" if self.unit else self.text


METRICS: dict[str, Metric] = {
    "eval_loss": Metric("held-out loss, per trained token", "nats", -1),
    "perplexity": Metric("held-out perplexity", "", -1),
    "closed_think_rate": Metric("answers that close their thinking once", "share", 1, yes_or_no=True),
    "finished_rate": Metric("answers that end by themselves", "share", 1, yes_or_no=True),
    "answered_rate": Metric("answers with text after the thinking", "share", 1, yes_or_no=True),
    "thinking_tokens": Metric("length of the thinking", "tokens", 0),
    "thinking_words": Metric("length of the thinking", "words", 0),
    "answer_tokens": Metric("length of the answer", "tokens", 0),
    "answer_words": Metric("length of the answer", "words", 0),
    "completion_words": Metric("length of everything written", "words", 0),
    "bullet_rate": Metric("answers that are a list", "share", 0, yes_or_no=True),
    "one_paragraph_rate": Metric("answers that are one paragraph", "share", 0, yes_or_no=True),
    "repetition": Metric("4-word sequences that came before in the same text", "share", -1),
    "copied": Metric("words of the answer that copy the question, in sequences of 8", "share", 0),
    "rouge_l": Metric("ROUGE-L of the answer against the reference", "F1", 1),
    "chrf": Metric("chrF of the answer against the reference", "0 to 1", 1),
    "embedding_similarity": Metric("likeness of meaning to the reference, by evaluation.embedding_model", "cosine", 1),
    "mcq_accuracy": Metric("multiple choice read strictly", "share", 1, yes_or_no=True),
    "mcq_abstained": Metric("multiple choice without a readable answer", "share", -1, yes_or_no=True),
    "mcq_letter": Metric("multiple choice by letter", "share", 1, yes_or_no=True),
    "mcq_likelihood": Metric("multiple choice by likelihood", "share", 1, yes_or_no=True),
    "mcq_accuracy_answered": Metric("multiple choice read strictly, if both models answered", "share", 1, yes_or_no=True),
}
# An answer is compared with the reference without the words it copied: a copied question resembles any text on its subject.
# A model that never closes its tag has no answer, so its style is measured on its thinking.

# A bullet, or a number, plain or bold. In Chinese and Japanese no space follows the mark. The indent may not match a line
# break: over blank lines, the search would start again at each of them.
_SPACED = r"[-+*•‣◦▪●○■□–—]|(?:\*\*|__)?(?:\d+[.)]|\(\d+\))(?:\*\*|__)?"
_UNSPACED = r"(?:\*\*|__)?(?:(?:\d+|[一二三四五六七八九十]+)[、．]|（(?:\d+|[一二三四五六七八九十]+)）|[①-⑳])|[・·]"
_BULLET = re.compile(rf"^[^\S\n]*(?:(?:{_SPACED})\s+|(?:{_UNSPACED})[^\S\n]*)\S", re.MULTILINE)
_REPEATED_WORDS = 4


def is_bullet_list(text: str) -> bool:
    """Return whether two or more lines begin with a bullet or a number, as in `- a`, `1. a`, `**1. a**`, or `1、a`.

    The article says that the base model answers in such lists."""
    return len(_BULLET.findall(text)) >= 2


def count_paragraphs(text: str) -> int:
    """Count the blocks of text between blank lines."""
    return len([block for block in re.split(r"\n\s*\n", text) if block.strip()])


def repetition(text: str) -> float:
    """Return the share of 4-word sequences that occurred earlier in the text; 0 for a shorter text. A loop comes near 1."""
    words = split_words(text.lower())
    sequences = [tuple(words[i : i + _REPEATED_WORDS]) for i in range(len(words) - _REPEATED_WORDS + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 of an answer against the reference response; 0 for an empty answer.

    The rouge-score package finds words of ASCII letters and digits only. Words here are the same for ASCII texts, and include
    every script. They are stemmed as in rouge-score (Porter's stemmer, words of more than 3 letters)."""
    from rapidfuzz.distance import LCSseq
    from rouge_score.scoring import fmeasure

    ours, theirs = ([_stem(word) for word in split_words(normalize(text))] for text in (answer, reference))
    if not ours or not theirs:
        return 0.0
    # rouge-score's own table of words against words would take a gigabyte for a text of a few thousand lines.
    common = LCSseq.similarity(ours, theirs)
    return fmeasure(common / len(ours), common / len(theirs))


@cache
def _stem(word: str) -> str:
    """Return the stem of a word. The cache helps because words repeat, and stemming takes half the time of measuring."""
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem(word) if len(word) > 3 else word


def chrf(answer: str, reference: str) -> float:
    """Return chrF2 of an answer against the reference, from 0 to 1; 0 for an empty answer.

    It counts character n-grams up to 6, as in sacrebleu. Source: Popović 2015."""
    from sacrebleu import sentence_chrf

    return sentence_chrf(answer, [reference]).score / 100


def cut_lengths(record: AnswerRecord) -> set[str]:
    """Return the names of an answer's lengths that are lower bounds, because a token budget ended the text."""
    thinking = {"thinking_tokens", "thinking_words"} if thinking_is_cut(record) else set()
    rest = set() if record["finished"] else {"answer_tokens", "answer_words"}
    return thinking | rest | ({"completion_words"} if thinking or rest else set())


def measure_answer(record: AnswerRecord, question: Question) -> dict[str, float]:
    """Return {name: value} of every metric of one answer, except the losses.

    The similarity to the reference is that of the answer without the words it copied from the question
    (`copied.remove_copied`)."""
    answer, thinking = record["answer"], record["thinking"]
    written = answer or thinking
    own, copied = remove_copied(answer, question["Question"])
    return {
        # Well-formed thinking is closed exactly once, with text on both sides. A bare or doubled tag does not count.
        "closed_think_rate": float(record["well_formed"]),
        "finished_rate": float(record["finished"]),
        "answered_rate": float(bool(answer.strip())),
        "thinking_tokens": float(record["thinking_tokens"]),
        "thinking_words": float(len(split_words(thinking))),
        "answer_tokens": float(record["answer_tokens"]),
        "answer_words": float(len(split_words(answer))),
        "completion_words": float(len(split_words(thinking)) + len(split_words(answer))),
        "bullet_rate": float(is_bullet_list(written)),
        "one_paragraph_rate": float(count_paragraphs(written) == 1 and not is_bullet_list(written)),
        "repetition": repetition(f"{thinking} {answer}"),
        "copied": copied,
        "rouge_l": rouge_l(own, question["Response"]),
        "chrf": chrf(own, question["Response"]),
    }


def answer_columns(
    records: Sequence[AnswerRecord], questions: Sequence[Question], embedding_model: str | None = None
) -> dict[str, np.ndarray]:
    """Return {metric: column}, with one value per answer; `records` and `questions` are in the same order.

    With an embedding model, `embedding_similarity` is among the metrics. Raises MetricError as `embedder` does."""
    values = [measure_answer(record, question) for record, question in zip(records, questions, strict=True)]
    columns = {name: np.array([row[name] for row in values], dtype=float) for name in values[0]}
    if embedding_model is not None:
        own = [
            remove_copied(record["answer"], question["Question"])[0] for record, question in zip(records, questions, strict=True)
        ]
        references = [question["Response"] for question in questions]
        columns["embedding_similarity"] = embedding_similarity(own, references, embedding_model)
    return columns


def sampled_columns(
    samples: Sequence[Sequence[AnswerRecord]], questions: Sequence[Question], embedding_model: str | None = None
) -> dict[str, np.ndarray]:
    """Return {metric: column}, with each question's mean over its samples.

    `samples` holds one sequence of answers per sample, each in the order of `questions`."""
    columns = [answer_columns(records, questions, embedding_model) for records in samples]
    return {name: np.mean([column[name] for column in columns], axis=0) for name in columns[0]}


def embedding_similarity(answers: Sequence[str], references: Sequence[str], name: str) -> np.ndarray:
    """Return the cosine of each answer's sentence embedding and its reference's; 0 for an empty answer.

    It is similarity of meaning as that model sees it. Such models find a denial very similar to the statement it denies.
    Raises MetricError as `embedder` does."""
    model = embedder(name)
    # In float64: a 16-bit model would normalize in 16 bits, and a text's similarity to itself would be 0.999.
    ours, theirs = (np.asarray(model.encode(list(texts), show_progress_bar=False), float) for texts in (answers, references))
    cosine = (ours * theirs).sum(axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return np.where([bool(answer.strip()) for answer in answers], cosine, 0.0)


@cache
def embedder(name: str) -> SentenceTransformer:
    """Load the sentence embedding model of this folder or Hub id, once. Raises MetricError as `load_sentence_model` does."""
    try:
        return load_sentence_model(name)
    except ModelError as error:
        raise MetricError(str(error)) from error
