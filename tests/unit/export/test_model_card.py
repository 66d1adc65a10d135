"""The model card's language: the setting's, the data set's own, or what the script of the texts says."""

from __future__ import annotations

import pytest
from made_up_runs import QUESTIONS, Tags, fill

from medcot_utils.config import load_config
from medcot_utils.evaluation.report import build_report
from medcot_utils.export.model_card import find_language, model_card
from medcot_utils.run.directory import Run

ZH, RU, DE = "急性心肌梗死，需要PCI。", "Острый инфаркт миокарда.", "Akuter Herzinfarkt."


@pytest.mark.parametrize(
    ("profile", "overrides", "text", "language"),
    [
        ("smoke", [], ZH, "en"),
        ("article", [], DE, "en"),
        ("article", ["dataset.subset=zh_mix"], DE, "zh"),
        ("article", ["dataset.subset=default"], ZH, "zh"),
        ("article", ["dataset.subset=main"], DE, None),
        ("smoke", ["dataset.path=own.jsonl"], ZH, "zh"),
        ("smoke", ["dataset.path=own.jsonl"], RU, None),
        ("smoke", ["dataset.path=own.jsonl", "hub.language=ru"], RU, "ru"),
        ("smoke", ["hub.language=pt-BR"], DE, "pt-BR"),
    ],
)
def test_the_language_is_the_settings_the_datas_or_the_scripts(profile, overrides, text, language):
    assert find_language(load_config(profile, overrides), [text]) == language


@pytest.mark.usefixtures("undrawn_figures", "statistics_computed_once")
def test_a_run_in_chinese_is_measured_and_described_as_such(tmp_path):
    from huggingface_hub import ModelCard

    config = load_config("smoke", ["dataset.path=zh.jsonl"])
    questions = [question | {"Question": f"{ZH}{i}？", "Response": ZH} for i, question in enumerate(QUESTIONS)]
    run = fill(Run.create(tmp_path / "run", config), questions=questions, base=("先休息。", True), tuned=(ZH, True), thinking=ZH)
    metrics = run.read("metrics")["metrics"]
    assert metrics["rouge_l"]["tuned"]["value"] == 1 > metrics["rouge_l"]["base"]["value"]
    assert metrics["answer_words"]["tuned"]["value"] == 9
    card, page = ModelCard(model_card(run)), " ".join(Tags(build_report(run)).text.split())
    assert card.data.language == "zh" and "English" not in card.text and "Texts in one language only (`zh`)" in card.text
    assert "9 words of thinking + 9 of answer" in page and "9 words of thinking + 3 of answer" in page
