"""What is measured of one answer: lists, paragraphs, repetition, likeness to a reference, and a model that gives none."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
import unicodedata

import numpy as np
import pytest

from medcot_utils.evaluation.metrics import (
    METRICS,
    MetricError,
    answer_columns,
    chrf,
    count_paragraphs,
    cut_lengths,
    embedder,
    embedding_similarity,
    is_bullet_list,
    measure_answer,
    repetition,
    rouge_l,
    sampled_columns,
)
from medcot_utils.run.artifacts import SHIPPED_CASES

REFERENCE = "The mitral valve is most often affected"


def asked(reference=REFERENCE, question="Which valve?"):
    return {"Question": question, "Response": reference}


def record(thinking="so", answer="the mitral valve", **changes):
    lengths = {"thinking_tokens": 7, "answer_tokens": 5}
    return (
        {"id": "q", "closed": 1, "well_formed": True, "finished": True, "thinking": thinking, "answer": answer}
        | lengths
        | changes
    )


# --- form ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("- aspirin\n- rest", True),
        ("Do this:\n\n1. aspirin\n2) rest", True),
        ("  • aspirin\n  * rest", True),
        ("- aspirin only", False),
        ("", False),
        ("A dose of 2.5 mg - not more -\nand rest for 3-4 days", False),
        ("-not a bullet\n-nor this", False),
        ("**bold**\n**bolder**", False),
        ("- \n- ", False),
        ("+ aspirin\n+ rest", True),
        ("– aspirin\n– rest", True),
        ("— аспирин\n— покой", True),
        ("**1. Aspirin**\nat once\n**2. Rest**\nfor days", True),
        ("**1)** aspirin\n**2)** rest", True),
        ("(1) aspirin\n(2) rest", True),
        ("1、阿司匹林\n2、休息", True),
        ("一、阿司匹林\n二、休息", True),
        ("（1）阿司匹林\n（2）休息", True),
        ("①阿司匹林\n②休息", True),
        ("・アスピリン\n・安静", True),
        ("+5 mg\n+10 mg", False),
        ("–5 °C\n–10 °C", False),
        ("**1.5 mg** now\n**2.5 mg** later", False),
        ("1.5 mg\n2.5 mg", False),
        ("十二指腸\n一個", False),
    ],
)
def test_a_bullet_list_is_two_lines_with_a_bullet_or_a_number(answer, expected):
    assert is_bullet_list(answer) is expected


@pytest.mark.parametrize("blank", ["\n", "\n ", "\r\n", " ", "- \n", "1", "x\n"], ids=repr)
def test_the_form_of_odd_long_texts_is_found_in_linear_time(blank):
    began = time.process_time()
    for text in (blank * 60_000, f"- aspirin{blank * 60_000}\n- rest"):
        is_bullet_list(text)
        count_paragraphs(text)
    assert is_bullet_list("\n" * 60_000 + "\r\n\n - aspirin\n\n \n\x85 - rest")
    assert time.process_time() - began < 2  # searches that begin anew at each blank line take minutes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        (" \n\n \t\n", 0),
        ("one", 1),
        ("one\nstill one", 1),
        ("one\n\ntwo", 2),
        ("\n\none\n \t \n\n\ntwo\n", 2),
        ("one\r\n\r\ntwo\r\n\r\nthree", 3),
    ],
)
def test_paragraphs_are_what_blank_lines_part(text, expected):
    assert count_paragraphs(text) == expected


@pytest.mark.parametrize(
    ("thinking", "answer", "expected"),
    [
        ("first\n\nsecond", "One block\nof two lines.", 1),
        ("so", "One.\n\nTwo.", 0),
        ("so", "- aspirin\n- rest", 0),
        ("so", "- aspirin only", 1),
        ("all of it in one block", "", 1),
        ("first\n\nsecond", "", 0),
        ("", "", 0),
    ],
    ids=["one block", "two blocks", "a list", "one bullet", "no answer, one block", "no answer, two blocks", "nothing"],
)
def test_one_paragraph_means_exactly_one_and_no_list(thinking, answer, expected):
    assert measure_answer(record(thinking, answer), asked())["one_paragraph_rate"] == expected


# --- repetition ----------------------------------------------------------------------------------------------------

NORMAL = (
    "The rash is purpuric and the joints hurt, so I think of vasculitis first. In a child of six, with belly pain after a cold, "
    "IgA vasculitis fits best. The kidneys decide the outcome; urine must be checked for blood and protein over some months."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("a b c", 0),
        ("a b c d", 0),
        ("a b c d a b c d", 1 - 4 / 5),
        ("A b c d\na  B c d", 1 - 4 / 5),
        ("a a a a a", 1 / 2),
    ],
    ids=["nothing", "too short", "one sequence", "the first comes twice", "case and spaces do not count", "one word"],
)
def test_repetition_is_the_share_of_repeated_four_word_sequences(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_a_loop_comes_near_1_and_normal_text_stays_near_0():
    assert repetition("I need to check again. " * 100) > 0.98
    assert repetition(NORMAL) < 0.02
    assert 0.3 < repetition(f"{NORMAL} {NORMAL}") < 0.6


def test_an_answer_that_repeats_the_thinking_is_repetition():
    assert measure_answer(record(NORMAL, NORMAL), asked())["repetition"] == pytest.approx(repetition(f"{NORMAL} {NORMAL}"))
    assert measure_answer(record(NORMAL, "Vasculitis."), asked())["repetition"] < 0.02


# --- likeness ------------------------------------------------------------------------------------------------------


def test_rouge_l_is_1_for_equal_and_0_for_unlike_or_empty_texts():
    assert rouge_l(REFERENCE, REFERENCE) == 1
    assert rouge_l("", REFERENCE) == 0 and rouge_l("kidney stones hurt", REFERENCE) == 0
    assert rouge_l("The mitral valve", REFERENCE) == pytest.approx(2 * 1 * (3 / 7) / (1 + 3 / 7))
    assert rouge_l("valve mitral the", REFERENCE) == pytest.approx(2 * (1 / 3) * (1 / 7) / (1 / 3 + 1 / 7)), "order counts"


TEXTS = {
    "Chinese": "急性心肌梗死，需要立即进行冠状动脉造影。",
    "Russian": "Острый инфаркт миокарда требует срочной коронарографии.",
    "Thai": "ผู้ป่วยมีไข้สูงและไอ",
    "Hindi": "रोगी को तेज़ बुखार है",
    "Arabic": "يعاني المريض من حمى شديدة",
    "German": "Ödeme, Übelkeit und ein großes Geschwür",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rouge_l_is_1_for_equal_texts_of_any_script(text):
    assert rouge_l(text, text) == 1 and rouge_l(text, unicodedata.normalize("NFD", text)) == 1
    assert 0 < rouge_l(text[: len(text) // 2], text) < 1
    assert rouge_l(text, REFERENCE) == 0 and repetition(text) < 0.2 and repetition(f"{text} " * 30) > 0.8


def test_rouge_l_of_ascii_texts_is_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    cases = [json.loads(line)["Response"] for line in SHIPPED_CASES.read_text(encoding="utf-8").splitlines()]
    texts = ["snake_case, it's 2.5 mg/kg--daily", "DIED dying lies 'n'", "_", *[text for text in cases if text.isascii()][:40]]
    assert len(texts) > 30
    for one, other in itertools.pairwise([*texts, *texts[::3]]):
        assert rouge_l(one, other) == scorer.score(other, one)["rougeL"].fmeasure


def test_lengths_count_characters_where_a_script_has_no_spaces():
    found = measure_answer(record("先看心电图", "急性心梗，休克。 PCI"), asked("急性心梗"))
    assert (found["thinking_words"], found["answer_words"], found["completion_words"]) == (5, 7, 12)


def test_chrf_is_1_for_equal_and_0_for_unlike_or_empty_texts():
    assert chrf(REFERENCE, REFERENCE) == pytest.approx(1)
    assert chrf("", REFERENCE) == 0 and chrf("x" * 30, "y" * 30) == pytest.approx(0, abs=1e-9)
    # One letter of two: precision 1, recall 1/2, and recall counts twice: 5 x 1 x 1/2 / (4 x 1 + 1/2).
    assert chrf("a", "ab") == pytest.approx(5 / 9)
    assert chrf("The aortic valve", REFERENCE) < chrf("The mitral valve", REFERENCE) < chrf("The mitral valve is", REFERENCE) < 1


def test_rouge_l_of_long_texts_takes_little_memory_and_time():
    words = NORMAL.split()
    answer, reference = " ".join(words * 30), " ".join(words * 1500)
    began = time.process_time()
    tracemalloc.start()
    try:
        assert rouge_l(answer, reference) == pytest.approx(2 * (30 / 1500) / (1 + 30 / 1500))
        assert tracemalloc.get_traced_memory()[1] < 100e6  # a table of words against words takes a gigabyte
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 10


def test_chrf_sees_inflected_words_that_rouge_l_misses():
    assert rouge_l("vasculitides", "vasculitis") == 0 < 0.5 < chrf("vasculitides", "vasculitis")


# --- records -------------------------------------------------------------------------------------------------------


def test_every_other_metric_is_measured_per_answer():
    others = {name for name in METRICS if name.startswith("mcq_")} | {"eval_loss", "perplexity", "embedding_similarity"}
    assert set(measure_answer(record(), asked())) == set(METRICS) - others


def test_lengths_count_the_words_of_thinking_and_answer():
    found = measure_answer(record("one  two\nthree", " four, five "), asked())
    assert (found["thinking_words"], found["answer_words"], found["completion_words"]) == (3, 2, 5)
    assert (found["thinking_tokens"], found["answer_tokens"]) == (7, 5), "as the record says: its tokenizer counted them"


def test_no_answer_is_measured_by_its_thinking_alone():
    loop = "1. mitral valve\n2. mitral valve\n" * 20
    found = measure_answer(record(loop, "", well_formed=False, finished=False, answer_tokens=0), asked())
    assert (found["closed_think_rate"], found["finished_rate"], found["answered_rate"]) == (0, 0, 0)
    assert (found["answer_words"], found["completion_words"]) == (0, 120)
    assert (found["rouge_l"], found["chrf"]) == (0, 0), "likeness is the answer's, and there is none"
    assert (found["bullet_rate"], found["one_paragraph_rate"]) == (1, 0) and found["repetition"] > 0.9


def test_a_model_that_writes_nothing_at_all_is_measured_too():
    found = measure_answer(record("", "", well_formed=False), asked())
    assert {name for name, value in found.items() if value} == {"finished_rate", "thinking_tokens", "answer_tokens"}


def test_an_answer_of_blanks_is_no_answer():
    assert (
        measure_answer(record(answer=" \n"), asked())["answered_rate"] == 0 < measure_answer(record(), asked())["answered_rate"]
    )


def test_columns_hold_one_value_per_question_in_order():
    columns = answer_columns([record(answer="one two"), record(answer="three")], [asked("one two"), asked("three three")])
    assert columns["answer_words"].tolist() == [2, 1]
    assert columns["rouge_l"].tolist() == [1, pytest.approx(2 / 3)]
    assert columns["chrf"].tolist() == [1, chrf("three", "three three")] != columns["rouge_l"].tolist()
    with pytest.raises(ValueError, match="zip"):
        answer_columns([record()], [asked(), asked()])


def test_of_several_samples_each_question_has_its_mean():
    first, second = ([record(answer="word " * n, finished=n > 2) for n in lengths] for lengths in ((2, 10), (4, 20)))
    columns = sampled_columns([first, second], [asked()] * 2)
    assert columns["answer_words"].tolist() == [3, 15] and columns["finished_rate"].tolist() == [0.5, 1]


@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        ({}, set()),
        ({"finished": False}, {"answer_tokens", "answer_words", "completion_words"}),
        (
            {"finished": False, "closed": 0},
            {"thinking_tokens", "thinking_words", "answer_tokens", "answer_words", "completion_words"},
        ),
        ({"closed": 0}, set()),
        ({"forced": {"closed_by": "budget"}}, {"thinking_tokens", "thinking_words", "completion_words"}),
        ({"forced": {"closed_by": "end"}, "closed": 0}, set()),
    ],
    ids=["whole", "the answer", "the thinking", "ended without a tag", "forced", "forced after its end"],
)
def test_what_a_budget_ended_has_a_length_of_at_least_that(changes, cut):
    assert cut_lengths(record(**changes)) == cut


# --- copied from the question --------------------------------------------------------------------------------------

LONG = "A man of sixty has had chest pain on exertion for three weeks and a loud systolic murmur."


def test_likeness_is_taken_without_what_copies_the_question():
    own = "The mitral valve is narrow."
    alone, after = (measure_answer(record(answer=answer), asked(own, LONG)) for answer in (own, f"{LONG} {own}"))
    assert (alone["copied"], after["copied"]) == (0, pytest.approx(18 / 23))
    assert after["rouge_l"] == alone["rouge_l"] == 1 and after["chrf"] == alone["chrf"]
    assert after["answer_words"] == 23, "lengths are of what was written"
    # A reference that restates the question does not reward an answer that copies it.
    copy = measure_answer(record(answer=LONG), asked(f"{LONG} {own}", LONG))
    assert (copy["copied"], copy["rouge_l"], copy["chrf"]) == (1, 0, 0)
    assert rouge_l(LONG, f"{LONG} {own}") > 0.8


# --- meaning -------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_semantic_similarity_is_the_cosine_of_the_embeddings():
    from sentence_transformers import SentenceTransformer

    from medcot_utils.models.embedded import find_model_source

    folder = find_model_source("embedded:tiny-random-llama")
    answers, references = ["Normal residual volume.", "  ", REFERENCE], [REFERENCE, REFERENCE, REFERENCE]
    found = embedding_similarity(answers, references, folder)
    a, b = SentenceTransformer(folder).encode([answers[0], REFERENCE])
    assert found[0] == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-3)  # bfloat16
    assert found[1] == 0 and found[2] == pytest.approx(1, abs=1e-3) and found[0] < 0.999
    columns = answer_columns([record(answer=answers[0])], [asked()], folder)
    copied = answer_columns([record(answer=LONG)], [asked(question=LONG)], folder)
    assert copied["embedding_similarity"].tolist() == [0]
    assert columns["embedding_similarity"].tolist() == pytest.approx([found[0]], abs=1e-3)
    assert "embedding_similarity" not in answer_columns([record(answer=answers[0])], [asked()])


def test_a_missing_embedding_model_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MetricError, match=r"evaluation\.embedding_model '.*nowhere' cannot be loaded: ") as error:
        embedder(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_a_metrics_label_has_its_unit_and_no_two_read_alike():
    labels = [found.label for found in METRICS.values()]
    assert len(set(labels)) == len(labels)
    assert METRICS["answer_words"].label == "length of the answer (words)"
    assert METRICS["perplexity"].label == "held-out perplexity"
