"""What an answer copies from its question: which words count, and what is left of the text."""

from __future__ import annotations

import time

import pytest

from medcot_utils.evaluation.copied import remove_copied

QUESTION = "A man of sixty has had chest pain on exertion for three weeks. Which valve is it?"
COPY = "a man of sixty has had chest pain on exertion"  # 10 words of the question


@pytest.mark.parametrize(
    ("answer", "left", "share"),
    [
        ("", "", 0),
        ("The mitral valve.", "The mitral valve.", 0),
        (f"{COPY} Mitral.", "Mitral.", 10 / 11),
        (f"Mitral. {COPY}", "Mitral.", 10 / 11),
        (f"First,\n\n{COPY}, so\nit is  mitral.", "First,\n\nso\nit is  mitral.", 10 / 15),
        ("A MAN of sixty: has had 'chest pain' on exertion!! Mitral.", "Mitral.", 10 / 11),
        (f"{COPY} {COPY} Mitral.", "Mitral.", 20 / 21),
        ("A man of sixty has had chest.", "A man of sixty has had chest.", 0),
        ("A man of sixty has had chest pain.", "", 1),
        (QUESTION, "", 1),
        (f"{QUESTION} —", "", 1),
        ("sixty of man a had has pain chest exertion on", "sixty of man a had has pain chest exertion on", 0),
    ],
    ids=[
        *("nothing", "its own words", "at the beginning", "at the end", "in the middle", "case and marks do not count", "twice"),
        *("seven words are none", "eight words are one", "all of it", "all but a mark", "order counts"),
    ],
)
def test_sequences_of_eight_words_of_the_question_are_removed(answer, left, share):
    assert remove_copied(answer, QUESTION) == (left, pytest.approx(share))


def test_a_question_of_fewer_words_has_nothing_to_copy():
    assert remove_copied("Which valve is it?", "Which valve is it?") == ("Which valve is it?", 0)


CHINESE = "患者男，六十岁，活动后胸痛三周，慢性阻塞性肺疾病病史十年，心尖部可闻及响亮的收缩期杂音，请问是哪个瓣膜？"


def test_where_characters_are_words_sixteen_in_a_row_are_a_copy():
    named = "考虑慢性阻塞性肺疾病和二尖瓣关闭不全。"  # the name of a disease is no copy, though it has eight characters
    assert remove_copied(named, CHINESE) == (named, 0)
    copy = "活动后胸痛三周，慢性阻塞性肺疾病病史十年"  # 19 characters, and a comma that is none
    assert remove_copied(f"{copy}，是二尖瓣。", CHINESE) == ("是二尖瓣。", pytest.approx(19 / 23))
    assert remove_copied(CHINESE, CHINESE) == ("", 1)


def test_one_foreign_character_does_not_make_sequences_longer():
    assert remove_copied(COPY, f"{QUESTION} 心") == ("", 1)


@pytest.mark.parametrize(
    "text", ["- \n" * 20_000, "word " * 20_000, "心" * 20_000, "é́" * 20_000], ids=["marks", "words", "han", "accents"]
)
def test_long_answers_are_searched_in_linear_time(text):
    began = time.process_time()
    remove_copied(text, f"{QUESTION} {text[:200]}")
    assert time.process_time() - began < 3
