"""Words of an answer that copy its question: how many they are, and what is left without them."""

from __future__ import annotations

from collections.abc import Sequence

from medcot_utils.data.contamination import NGRAM_WORDS, normalize
from medcot_utils.data.words import counts_characters, find_pieces, split_words

# A Chinese word has about one and a half characters, and the name of a disease can have eight or more (慢性阻塞性肺疾病).
# Sequences of only eight characters would count such a name as a copy. English names have one to four words.
_CHARACTERS_PER_WORD = 2


def remove_copied(answer: str, question: str) -> tuple[str, float]:
    """Return the answer without the word sequences that are also in the question, and their share of its words.

    A sequence has NGRAM_WORDS words or, in a script without spaces between words, twice as many characters. Words are compared
    after `contamination.normalize`. The rest of the answer stays as it was written. If every word is copied, the text is ""."""
    asked = split_words(normalize(question))
    spans = find_pieces(answer)
    pieces = [split_words(normalize(answer[start:end])) for start, end in spans]
    words = [word for piece in pieces for word in piece]
    in_characters = sum(map(counts_characters, asked)) > len(asked) / 2
    marks = _mark_copied(words, asked, NGRAM_WORDS * (_CHARACTERS_PER_WORD if in_characters else 1))
    if not any(marks):
        return answer, 0.0
    if all(marks):
        return "", 1.0

    kept, at, copied = [], 0, False
    for (start, _), piece, (end, _) in zip(spans, pieces, [*spans[1:], (len(answer), 0)], strict=True):
        # Punctuation between words has no word of its own, so it stays or goes with the piece before it.
        copied = all(marks[at : at + len(piece)]) if piece else copied
        at += len(piece)
        if not copied:
            kept.append(answer[start:end])
    return "".join(kept).strip(), sum(marks) / len(marks)


def _mark_copied(words: Sequence[str], asked: Sequence[str], length: int) -> list[bool]:
    """Return for each word whether it is part of a sequence of `length` words that is also in the question."""
    sequences = {tuple(asked[i : i + length]) for i in range(len(asked) - length + 1)}
    marks = [False] * len(words)
    for i in range(len(words) - length + 1):
        if tuple(words[i : i + length]) in sequences:
            marks[i : i + length] = [True] * length
    return marks
