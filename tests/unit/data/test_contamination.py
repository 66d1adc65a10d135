"""Repeated questions: found exactly, nearly, in pieces and in other columns, and what becomes of them in the evaluation."""

from __future__ import annotations

import time

import pytest
from datasets import Dataset

from medcot_utils.config import load_config
from medcot_utils.data.contamination import contaminated, find_repeats, normalize, tabulate_repeats
from medcot_utils.data.prompts import ARTICLE_QUESTION
from medcot_utils.data.rows import choose_questions, drop_repeats

# 19 words, so 12 sequences of 8.
ASKED = "A 40-year-old man has sudden chest pain radiating to the left arm. What is the first test?"
REWORDED = ASKED.replace("40", "42").replace("sudden", "acute")
LONG_WAY_ROUND = (
    "During your night shift in a small rural hospital the following case comes in by ambulance, and you have to decide quickly. "
    f"{ASKED} Please also say how often such a test is falsely negative, and what you would tell the worried family outside."
)
OTHER = "Which vitamin is lacking in scurvy, and how does its lack show itself on the skin and the gums of a sailor?"


def settings(**changes):
    return load_config("smoke", [f"dataset.{name}={value}" for name, value in changes.items()]).dataset


def rows(*changes: dict) -> Dataset:
    filled = [{"id": f"r{i}", "Question": f"q{i}", "Complex_CoT": "c", "Response": "a"} | row for i, row in enumerate(changes)]
    return Dataset.from_list(filled)


def questions(*texts: str) -> list[dict]:
    return [{"id": f"q-{i}", "Question": text} for i, text in enumerate(texts)]


def pairs(found: list[dict]) -> list[tuple[str, str]]:
    return [(one["train_id"], one["question_id"]) for one in found]


# --- found, and how ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (ASKED, True),
        (ASKED.upper().replace(".", " -"), True),
        (REWORDED, False),
        (LONG_WAY_ROUND, False),
        (OTHER, None),
    ],
    ids=["same", "same but for case and signs", "reworded", "embedded in a longer one", "another"],
)
def test_exact_near_and_lengthened_repeats_are_found(text, exact):
    found = find_repeats(rows({}, {"Question": text}), questions("unlike everything else here", ASKED), settings())
    assert [(one["train_id"], one["question_id"], one["exact"]) for one in found] == (
        [] if exact is None else [("r1", "q-1", exact)]
    )


def test_a_repeat_has_similarity_and_overlap():
    near, longer, same = find_repeats(
        rows({"Question": REWORDED}, {"Question": LONG_WAY_ROUND}, {"Question": ASKED}), questions(ASKED), settings()
    )
    assert 85 <= near["similarity"] < 100 and near["overlap"] < 0.7
    assert 20 < longer["similarity"] < 50 and longer["overlap"] == 1
    assert (same["similarity"], same["overlap"], same["exact"]) == (100, 1, True)
    assert [one["train_question"] for one in (near, longer, same)] == [REWORDED, LONG_WAY_ROUND, ASKED]


@pytest.mark.parametrize("column", ["Response", "Complex_CoT"])
def test_a_question_that_was_moved_into_another_column_is_found(column):
    train = rows({}, {"Question": "What comes to your mind?", column: f"Somebody asked me this. {ASKED} I did not know."})
    (found,) = find_repeats(train, questions(ASKED, OTHER), settings())
    assert (found["train_id"], found["question_id"], found["overlap"], found["exact"]) == ("r1", "q-0", 1, False)
    assert found["train_question"] == "What comes to your mind?"


def test_rows_with_questions_only_are_searched_by_them():
    train = Dataset.from_dict({"id": ["r0", "r1"], "Question": [OTHER, LONG_WAY_ROUND]})
    assert pairs(find_repeats(train, questions(ASKED), settings())) == [("r1", "q-0")]


def test_every_pair_is_a_record_of_its_own():
    train = rows({"Question": ASKED}, {"Question": OTHER}, {"Question": REWORDED})
    found = find_repeats(train, questions(ASKED, OTHER), settings())
    assert sorted(pairs(found)) == [("r0", "q-0"), ("r1", "q-1"), ("r2", "q-0")]


def test_a_question_under_8_words_is_matched_by_similarity_only():
    short = "Which valve is affected in rheumatic fever?"  # 7 words
    train = rows({"Question": short.upper()}, {"Question": f"I wonder. {short} Please answer at length, with all your reasons."})
    for asked in (questions(short), questions(short, OTHER)):
        (found,) = find_repeats(train, asked, settings())
        assert (found["train_id"], found["question_id"], found["exact"], found["overlap"]) == ("r0", "q-0", True, 0)


def test_a_question_of_no_words_among_others_stops_nothing():
    assert find_repeats(rows({"Question": ASKED}), questions("", ASKED), settings())[0]["question_id"] == "q-1"


def test_the_articles_question_is_found_in_the_training_rows():
    asked = choose_questions(rows({}, {}, {}), 2)
    train = rows({}, {}, {"Question": ARTICLE_QUESTION.lower()})
    assert pairs(find_repeats(train, asked[:1], settings())) == [("r2", "article")]


def test_long_questions_are_compared_by_their_beginnings_and_said(capsys):
    # In full, each pair of such texts takes 0.1 s.
    words = [" ".join(f"{start}{number}" for number in range(8_000)) for start in "abcdefgh"]
    train = rows(*({"Question": f"{ASKED * 30} {text}" if index == 2 else text} for index, text in enumerate(words)))
    began = time.process_time()
    found = find_repeats(train, questions(*(f"{ASKED * 30} {text}" for text in words)), settings())
    assert time.process_time() - began < 5
    near = {(one["train_id"], one["question_id"]): one for one in found if one["similarity"] > 85}
    assert sorted(near) == [("r2", f"q-{number}") for number in range(8)]
    assert [pair for pair, one in near.items() if one["exact"]] == [("r2", "q-2")]
    assert {(f"r{number}", f"q-{number}") for number in range(8)} <= set(pairs(found)), "sequences are compared in full"
    assert "16 questions are longer than 2,000 characters (MAX_COMPARED_CHARACTERS)" in capsys.readouterr().out


# --- thresholds ----------------------------------------------------------------------------------------------------


def test_the_similarity_threshold_is_respected():
    near, only_similar = rows({"Question": REWORDED}), {"ngram_overlap": 1}
    score = find_repeats(near, questions(ASKED), settings(near_repeat_similarity=50, **only_similar))[0]["similarity"]
    assert 85 < score < 99
    assert find_repeats(near, questions(ASKED), settings(near_repeat_similarity=score - 1, **only_similar))
    assert find_repeats(near, questions(ASKED), settings(near_repeat_similarity=score + 1, **only_similar)) == []


def test_the_overlap_from_which_a_row_repeats_is_respected():
    # The first 13 of 19 words hold 6 of the question's 12 sequences.
    train = rows({"Question": OTHER, "Response": " ".join(normalize(ASKED).split()[:13])})
    (found,) = find_repeats(train, questions(ASKED), settings(ngram_overlap=0.5))
    assert found["overlap"] == 0.5 and found["similarity"] < 85
    assert find_repeats(train, questions(ASKED), settings(ngram_overlap=0.51)) == []


def test_a_sequence_that_a_row_says_twice_counts_once():
    first = " ".join(normalize(ASKED).split()[:8])
    train = rows({"Response": f"{first}. " * 10})
    (found,) = find_repeats(train, questions(ASKED), settings(ngram_overlap=0.05))
    assert found["overlap"] == round(1 / 12, 2)


def test_a_common_turn_of_8_words_does_not_make_a_repeat():
    one, other = (f"{start} what is the most likely diagnosis in this patient?" for start in (ASKED, OTHER))
    assert find_repeats(rows({"Question": other}), questions(one), settings()) == []
    assert find_repeats(rows({"Question": other}), questions(one), settings(ngram_overlap=0.05)) != []


# --- scripts -------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "Ukrainian": "У чоловіка сорока років раптовий біль у грудях, що віддає в ліву руку: яке обстеження роблять першим?",
    "Greek": "Ένας άνδρας σαράντα ετών έχει αιφνίδιο πόνο στο στήθος που φτάνει στο χέρι: ποια εξέταση γίνεται πρώτη;",
    "Arabic": "رجل عمره أربعون سنة يشكو من ألم مفاجئ في الصدر يمتد إلى الذراع الأيسر فما هو أول فحص؟",
    "Portuguese": "Um homem de quarenta anos tem dor súbita no peito que irradia para o braço esquerdo: qual é o primeiro exame?",
    "Hindi": "चालीस साल के एक आदमी की छाती में अचानक दर्द है जो बाएँ हाथ तक जाता है: पहली जाँच कौन सी है?",
    "Chinese": "一名四十岁男子突发胸痛并放射至左臂，既往有高血压病史，首先应当做什么检查？",
}


@pytest.mark.parametrize("language", SCRIPTS)
def test_repeats_are_found_in_any_script(language):
    text = SCRIPTS[language]
    train = rows({"Question": OTHER}, {"Question": f"  {text.upper()}!"}, {"Question": SCRIPTS["Greek"][::-1]})
    (found,) = find_repeats(train, questions(text), settings())
    assert (found["train_id"], found["similarity"], found["overlap"], found["exact"]) == ("r1", 100, found["overlap"], True)


@pytest.mark.parametrize("language", SCRIPTS)
def test_an_embedded_question_is_found_in_any_script(language):
    before = "在一家小型乡村医院值夜班时，救护车送来了下面这位病人，您必须尽快作出决定，家属在外面焦急等待。"
    train = rows({"Question": OTHER}, {"Question": f"{before} {OTHER} {SCRIPTS[language]} {OTHER}"})
    assert pairs(find_repeats(train, questions(SCRIPTS[language]), settings())) == [("r1", "q-0")]


def test_normalize_keeps_letters_and_digits_only():
    assert normalize("  A 61-year-old_woman's\nTest: 3.5%?\t") == "a 61 year old woman s test 3 5"


@pytest.mark.parametrize(("one", "other"), [("दिल", "दाल"), ("กัน", "กิน")], ids=["Hindi", "Thai"])
def test_normalize_tells_words_apart_that_differ_in_a_vowel_sign(one, other):
    assert normalize(one) != normalize(other)


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0308\u0301", "\uff9e\u0316", "\u0344\u0316"], ids=ascii)
def test_normalize_takes_linear_time_over_combining_marks(marks):
    began = time.process_time()
    assert normalize("e\u0301" + "x" + marks * 50_000) == normalize("É" + "X" + marks * 50_000)
    assert time.process_time() - began < 2  # canonical ordering of one long run takes minutes


def test_normalize_joins_a_letter_and_its_accent():
    assert normalize("cafe\u0301") == normalize("café")


# --- what becomes of them ------------------------------------------------------------------------------------------


def data_report(repeats: list[dict], dropped: bool) -> dict:
    return {"repeats": repeats, "repeats_dropped": dropped}


def test_questions_are_contaminated_unless_rows_were_dropped():
    asked, train = questions(OTHER, ASKED, "Why?"), rows({"Question": REWORDED}, {"Question": ASKED}, {})
    repeats = find_repeats(train, asked, settings())
    assert contaminated(data_report(repeats, dropped=False)) == {"q-1"}
    assert contaminated(data_report(repeats, dropped=True)) == set()
    assert drop_repeats(train, repeats)["id"] == ["r2"]


def test_the_table_shows_each_question_beside_its_repeating_row():
    asked, train = questions(OTHER, ASKED), rows({"Question": REWORDED})
    (line,) = tabulate_repeats(find_repeats(train, asked, settings()), asked).to_dict("records")
    assert line["question"] == f"q-1: {ASKED}" and line["training row"] == f"r0: {REWORDED}"
    assert 85 <= line["similarity"] < 100 and not line["exact"]
    assert tabulate_repeats([], asked).empty


def test_questions_with_numeric_row_ids_are_contaminated_too():
    held_out = rows({"id": 41, "Question": ASKED}, {"id": 42, "Question": OTHER})
    asked = choose_questions(held_out, 2)
    # As notebook 03 looks for them: the article's question and the held-out rows themselves.
    repeats = find_repeats(rows({"Question": ASKED}), [asked[0], *held_out], settings())
    assert contaminated(data_report(repeats, dropped=False)) == {"41"}
