"""Words in any script: what white space parts, or characters where a script has no spaces."""

from __future__ import annotations

import pytest

from medcot_utils.data.words import counts_characters, guess_language, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a  b\nc - d", ["a", "b", "c", "-", "d"]),
        ("Sjögren's, Ménière.", ["Sjögren's,", "Ménière."]),
        ("Острый инфаркт миокарда.", ["Острый", "инфаркт", "миокарда."]),
        ("급성 심근경색", ["급성", "심근경색"]),
        ("急性心梗，休克。", list("急性心梗休克")),
        ("血压 120/80mmHg 正常", ["血", "压", "120/80mmHg", "正", "常"]),
        ("血压120mmHg", ["血", "压", "120mmHg"]),
        ("がんの疑い", list("がんの疑い")),
        ("ไข้สูง", ["ไ", "ข้", "สู", "ง"]),
        ("", []),
    ],
    ids=["ASCII", "accents", "Russian", "Korean", "Chinese", "mixed", "mixed, no space", "Japanese", "Thai", "nothing"],
)
def test_words_are_parted_by_space_or_are_characters(text, words):
    assert split_words(text) == words
    assert counts_characters(text) is (len(words) > len(text.split()))


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        (["急性心肌梗死，需要PCI治疗。"], "zh"),
        (["急性心筋梗塞が疑われるので、心電図をとる。"], "ja"),
        (["급성 심근경색이 의심된다."], "ko"),
        (["ไข้สูงและไอ"], "th"),
        (["Acute myocardial infarction (急性心梗)."], None),
        (["Akuter Herzinfarkt.", "Острый инфаркт."], None),
        ([], None),
    ],
)
def test_a_language_is_guessed_only_from_a_script_of_its_own(texts, code):
    assert guess_language(texts) == code
