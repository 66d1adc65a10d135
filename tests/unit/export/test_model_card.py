"""The model card's language: the setting's, the data set's own, or what the script of the texts says."""

from __future__ import annotations

import re

import pytest
from made_up_runs import CONFIG, MORE, QUESTIONS, Tags, fill, fill_more

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


# --- the merged model ------------------------------------------------------------------------------------------------


def rows(card, first):
    """{first cell: the others} of the table whose head begins so."""
    lines = card.text[card.text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({len(line) for line in cells}) == 1, "every row has as many cells as the head"
    return {line[0]: line[1:] for line in cells}


@pytest.fixture(scope="module")
def measured_more(tmp_path_factory):
    return fill_more(Run.create(tmp_path_factory.mktemp("more") / "run", MORE))


def test_the_card_has_a_column_for_the_merged_model(measured_more):
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(measured_more))
    table = rows(card, "metric")
    assert table["metric"] == ["base", "tuned", "merged", "difference, tuned from base", "verdict"]
    assert [cell.split(" [")[0] for cell in table["held-out loss, per trained token (nats)"]][:3] == ["3.99", "3.18", "3.06"]
    assert "merged into the 16-bit base. **Does the merged model behave as measured? Form: no" in card.text
    assert "form: answers that close their thinking once: differs: fell, worse" in card.text
    assert "| shipped, letter |" in card.text and "With forced closing" in card.text and "16-bit base has" in card.text


def test_the_cards_tables_keep_intervals_whole_and_numbers_right(measured_more):
    text = model_card(measured_more)
    assert len(re.findall(r"\[-?\d\S*,\xa0-?\d\S*\]", text)) > 50 and not re.search(r"\[-?\d[\d.]*, -?\d", text)
    tables = re.findall(r"^\| (.*) \|\n\| (.*) \|$", text, re.MULTILINE)
    sides = [dict(zip(head.split(" | "), rule.split(" | "), strict=True)) for head, rule in tables if set(rule) <= set("-:| ")]
    texts = {"metric", "verdict", "task and reading", "what it measures"}
    assert len(sides) == 4
    assert all(rule == (":---" if name in texts else "---:") for side in sides for name, rule in side.items())
    assert "32,768 trainable parameters" in text


def test_the_hub_is_told_the_scores_of_what_people_load(measured_more):
    from huggingface_hub import ModelCard

    merged, adapter = (
        {result.metric_type: result for result in ModelCard(model_card(measured_more, kind)).data.eval_results}
        for kind in ("merged", "adapter")
    )
    assert (merged["closed_think_rate"].metric_value, adapter["closed_think_rate"].metric_value) == (0.71, 1.0)
    assert "merged 16-bit model" in merged["closed_think_rate"].task_name
    assert "4-bit base + adapter" in adapter["closed_think_rate"].task_name
    assert "mcq_accuracy" in adapter and "mcq_accuracy" not in merged, "the merged model was not asked"
    assert merged["eval_loss"].metric_args["base_value"] == 3.99


@pytest.mark.parametrize(
    ("override", "words"), [("base_16bit", "the 16-bit base"), ("dequantized_4bit", "the 4-bit weights that it was trained")]
)
def test_the_card_says_what_the_adapter_was_merged_into(tmp_path, override, words):
    config = MORE.model_copy(update={"export": MORE.export.model_copy(update={"merge_into": override})})
    text = model_card(fill_more(Run.create(tmp_path / "run", config), not_measured="needs 15.0 GiB"))
    assert f"The adapter was merged into {words}" in text and "Its answers were not measured: needs 15.0 GiB." in text


def test_a_card_of_a_merge_into_4_bits_knows_one_reference(tmp_path):
    run = fill(Run.create(tmp_path / "run", CONFIG))
    check = run.read("export_check")
    run.write("export_check", check | {"pairs": check["pairs"][1:]})
    text = " ".join(model_card(run).split())
    assert "Merged model against 4-bit base + adapter" in text and "The merged model was made from it: on 8" in text
    assert "greedy tokens are the same on 1 of 3 prompts" in text


def test_a_card_without_a_measured_merged_model_has_two_columns(tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(fill(Run.create(tmp_path / "run", CONFIG))))
    assert rows(card, "metric")["metric"] == ["base", "tuned", "difference, tuned from base", "verdict"]
    assert "## The merged model" not in card.text and "forced closing" not in card.text
