"""Text column, tokens and labels: the mask, over-long rows, and what is checked before a step is trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import normalizers

from medcot_utils import data
from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.data.rows import DataError, load_rows, split_rows, validate_rows
from medcot_utils.data.tokens import add_text_column, check_labels, tokenize_rows
from medcot_utils.models.engine import load_tokenizer

pytestmark = pytest.mark.model

# Outside the repository, and only on the machines that have it: 100 real rows of the article's data set.
REAL_ROWS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "o1_sft_sample.jsonl"
CASES = [
    {"id": "plain", "Question": "Why is the skin yellow?", "Complex_CoT": "Bilirubin, then.", "Response": "Jaundice."},
    {"id": "é", "Question": "Fièvre à 39 °C — pourquoi ?", "Complex_CoT": "Ça dépend…\n\nInfection 😀.", "Response": "Virus."},
    {"id": "newline first", "Question": "Which test?", "Complex_CoT": "\n\n  Troponin rises.", "Response": " It is troponin."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(load_config("smoke").model)


@pytest.fixture(scope="module")
def newline_merging_tokenizer():
    """As many tokenizers do: three newlines are one token."""
    tokenizer = load_tokenizer(load_config("smoke").model)
    tokenizer.add_tokens(["\n\n\n"])
    return tokenizer


def rows_with_text(tokenizer, rows=CASES) -> Dataset:
    return add_text_column(Dataset.from_list(list(rows)), tokenizer.eos_token)


def tokenized(tokenizer, *overrides, limit=1024, newline=True, rows=CASES):
    dataset = load_config("smoke", [f"dataset.{override}" for override in overrides]).dataset
    return tokenize_rows(rows_with_text(tokenizer, rows), tokenizer, dataset, limit, newline)


def test_text_column_is_the_filled_template_with_one_eos(tokenizer):
    text = rows_with_text(tokenizer)["text"][0]
    assert text == inference_prompt(CASES[0]["Question"]) + "Bilirubin, then.\n</think>\nJaundice." + tokenizer.eos_token
    assert tokenizer.eos_token == "<|end_of_text|>"


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case["id"] for case in CASES])
@pytest.mark.parametrize("newline", [True, False])
def test_completion_labels_are_masked_exactly_on_the_prompt(tokenizer, case, newline):
    rows, _ = tokenized(tokenizer, "loss_on=completion", newline=newline)
    row, prompt = rows[case], inference_prompt(CASES[case]["Question"], newline)
    masked = row["labels"].count(-100)
    assert row["labels"] == [-100] * masked + row["input_ids"][masked:]
    assert tokenizer.decode(row["input_ids"][:masked]) == tokenizer.bos_token + prompt
    assert tokenizer.decode(row["input_ids"][masked:]) == row["text"].removeprefix(prompt)


def test_a_token_over_the_prompts_end_is_learnt(newline_merging_tokenizer):
    rows, _ = tokenized(newline_merging_tokenizer, "loss_on=completion")
    labels = [label for label in rows[2]["labels"] if label != -100]
    assert newline_merging_tokenizer.decode(labels[:1]) == "\n\n\n"
    assert newline_merging_tokenizer.decode(labels).strip().startswith("Troponin rises.")


DECOMPOSED = {
    "id": "decomposed",
    "Question": "Fie\u0300vre ?",
    "Complex_CoT": "C\u0327a de\u0301pend, re\u0301flexion.",
    "Response": "E\u0301tat.",
}


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Lowercase()])
def test_a_cot_that_the_tokenizer_normalizes_is_found_in_labels(tokenizer, normalizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizer
    rows, _ = tokenized(tokenizer, rows=[*CASES, DECOMPOSED])
    assert check_labels(rows, tokenizer)["cot_in_labels"] == 4
    masked = rows[3]["labels"].count(-100)
    assert tokenizer.decode(rows[3]["input_ids"][masked:]).casefold().startswith(("ça", "c\u0327a"))


def test_another_cot_is_not_found_in_normalized_labels(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    rows, _ = tokenized(tokenizer, rows=[DECOMPOSED])
    other = rows.map(lambda row: {"Complex_CoT": row["Complex_CoT"].replace("re\u0301", "re")})
    with pytest.raises(DataError, match="1 rows lack their Complex_CoT"):
        check_labels(other, tokenizer)


def test_full_labels_are_the_tokens_themselves(tokenizer):
    rows, _ = tokenized(tokenizer, "loss_on=full")
    assert rows["labels"] == rows["input_ids"]
    assert all(ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id for ids in rows["input_ids"])


@pytest.mark.parametrize(("newline", "count"), [(True, 2), (False, 3)])
def test_rows_that_begin_with_the_prompts_tokens_are_counted(newline_merging_tokenizer, newline, count):
    # The third CoT begins with newlines, which become one token with the template's own: another than the prompt ends in.
    _, lengths = tokenized(newline_merging_tokenizer, newline=newline)
    assert lengths.prompt_is_prefix == count


LONG = [*CASES, CASES[0] | {"id": "long", "Complex_CoT": "Bilirubin. " * 400}]


def test_overlong_rows_are_dropped_and_counted(tokenizer):
    rows, lengths = tokenized(tokenizer, "overlong=drop", limit=500, rows=LONG)
    assert rows["id"] == [case["id"] for case in CASES]
    assert (lengths.dropped, lengths.truncated, len(lengths.tokens)) == (1, 0, 4)
    assert max(lengths.tokens) > 500


def test_overlong_rows_are_truncated_and_counted(tokenizer):
    rows, lengths = tokenized(tokenizer, "overlong=truncate", limit=500, rows=LONG)
    assert [len(ids) for ids in rows["input_ids"]] == [*lengths.tokens[:3], 500]
    assert [len(labels) for labels in rows["labels"]] == [len(ids) for ids in rows["input_ids"]]
    assert (lengths.dropped, lengths.truncated) == (0, 1)
    assert check_labels(rows, tokenizer, lengths.truncated)["eos_in_labels"] == 3


@pytest.mark.parametrize("loss_on", ["full", "completion"])
@pytest.mark.parametrize("question", ["Why? " * 400, "Why? " * 90], ids=["the question alone", "nearly no reasoning"])
def test_a_row_cut_before_its_reasoning_is_dropped_and_said(tokenizer, capsys, loss_on, question):
    long = [*LONG, CASES[0] | {"id": "long question", "Question": question, "Complex_CoT": "Bilirubin. " * 400}]
    rows, lengths = tokenized(tokenizer, "overlong=truncate", f"loss_on={loss_on}", limit=500, rows=long)
    assert rows["id"] == [case["id"] for case in LONG]
    assert (lengths.dropped, lengths.truncated) == (1, 1)
    assert check_labels(rows, tokenizer, lengths.truncated)["cot_in_labels"] == 4
    assert capsys.readouterr().out.startswith("1 of 5 rows are dropped: cut at model.max_seq_length (500 tokens), they")


def test_overlong_row_is_an_error_that_names_it_if_so_set(tokenizer):
    with pytest.raises(DataError, match=r"row long has \d+ tokens, more than model\.max_seq_length \(500\)"):
        tokenized(tokenizer, "overlong=error", limit=500, rows=LONG)


def test_a_row_of_just_the_limit_is_kept_whole(tokenizer):
    _, lengths = tokenized(tokenizer)
    rows, cut = tokenized(tokenizer, "overlong=error", limit=max(lengths.tokens))
    assert len(rows) == 3 and cut.truncated == 0


def test_rows_that_are_all_too_long_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"every row is longer than model\.max_seq_length \(64\)"):
        tokenized(tokenizer, "overlong=drop", limit=64)


# --- checks before training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["full", "completion"])
def test_good_rows_pass_every_check(tokenizer, loss_on):
    rows, _ = tokenized(tokenizer, f"loss_on={loss_on}")
    assert check_labels(rows, tokenizer) == {"rows": 3, "one_bos": 3, "eos_in_labels": 3, "cot_in_labels": 3}


def _change(rows: Dataset, index: int, change) -> Dataset:
    return Dataset.from_list([change(row) if i == index else row for i, row in enumerate(rows)])


def test_a_text_that_brings_its_own_bos_is_caught(tokenizer):
    rows = rows_with_text(tokenizer)
    doubled = _change(rows, 1, lambda row: row | {"text": tokenizer.bos_token + row["text"]})
    rows, _ = tokenize_rows(doubled, tokenizer, load_config("smoke").dataset, 1024, True)
    with pytest.raises(DataError, match="row é begins with 2 BOS tokens, expected 1"):
        check_labels(rows, tokenizer)


def test_a_missing_bos_is_caught(tokenizer):
    rows, _ = tokenized(tokenizer)
    bare = _change(rows, 0, lambda row: row | {key: row[key][1:] for key in ("input_ids", "labels")})
    with pytest.raises(DataError, match="row plain begins with 0 BOS tokens, expected 1"):
        check_labels(bare, tokenizer)


def test_labels_that_are_all_masked_are_caught(tokenizer):
    rows, _ = tokenized(tokenizer)
    masked = _change(rows, 2, lambda row: row | {"labels": [-100] * len(row["labels"])})
    with pytest.raises(DataError, match="row newline first: every label is -100"):
        check_labels(masked, tokenizer)


def test_a_missing_eos_is_caught_unless_that_many_rows_were_cut(tokenizer):
    rows, _ = tokenized(tokenizer)
    endless = _change(rows, 0, lambda row: row | {key: row[key][:-1] for key in ("input_ids", "labels")})
    with pytest.raises(DataError, match=r"1 rows do not end in the EOS token '<\|end_of_text\|>', though only 0 were cut"):
        check_labels(endless, tokenizer)
    assert check_labels(endless, tokenizer, truncated=1)["eos_in_labels"] == 2


def test_a_masked_eos_is_caught(tokenizer):
    rows, _ = tokenized(tokenizer)
    masked = Dataset.from_list([row | {"labels": [*row["labels"][:-1], -100]} for row in rows])
    with pytest.raises(DataError, match="3 rows do not end in the EOS token"):
        check_labels(masked, tokenizer)


def test_a_chain_of_thought_that_is_not_in_the_labels_is_caught(tokenizer):
    rows = rows_with_text(tokenizer)
    without = _change(rows, 0, lambda row: row | {"text": row["text"].replace(row["Complex_CoT"], "")})
    rows, _ = tokenize_rows(without, tokenizer, load_config("smoke").dataset, 1024, True)
    with pytest.raises(DataError, match="1 rows lack their Complex_CoT in the labels"):
        check_labels(rows, tokenizer)


# --- the whole path ----------------------------------------------------------------------------------------------------


def test_shipped_cases_go_through_the_whole_path_without_a_loss(tokenizer):
    config = load_config("demo")
    rows, validation = validate_rows(load_rows(config.dataset), tokenizer.all_special_tokens)
    train, held_out = split_rows(rows, config.dataset, config.seed)
    train, lengths = tokenized(tokenizer, rows=train.to_list())
    checks = check_labels(train, tokenizer, lengths.truncated)
    report = data.summarize_preparation(validation, lengths, checks, [], True)
    _, of_held_out = tokenized(tokenizer, rows=held_out.to_list())
    whole = data.summarize_preparation(validation, lengths, checks, [], True, of_held_out)
    assert whole == report | {"held_out": 40, "held_out_overlong": 0}
    assert sum(use["rows"] for use in data.list_uses(whole, config)) == 160
    assert (len(train), len(held_out), validation.dropped, lengths.dropped) == (120, 40, {}, 0)
    assert report == json.loads(json.dumps(report))
    assert report["tokens"]["max"] <= 1024 and report["prompt_is_prefix"] == 120


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason="the sample of real rows is not beside this checkout")
def test_real_rows_load_from_dataset_path_at_full_length(tokenizer):
    overrides = [f"dataset.path={json.dumps(str(REAL_ROWS))}", "dataset.num_rows=80", "dataset.held_out_rows=20"]
    config = load_config("smoke", overrides)
    rows, validation = validate_rows(load_rows(config.dataset), tokenizer.all_special_tokens)
    words = [len(text.split()) for text in rows["Complex_CoT"]]
    assert (validation.rows_in, validation.rows_kept) == (100, 100)
    assert min(words) > 150 and 300 < sum(words) / len(words) < 450
    train, held_out = split_rows(rows, config.dataset, config.seed)
    train, lengths = tokenized(tokenizer, "overlong=drop", limit=2048, rows=train.to_list())
    assert (len(lengths.tokens), len(held_out)) == (80, 20)
    assert len(train) == 80 - lengths.dropped > 60
    assert check_labels(train, tokenizer)["cot_in_labels"] == len(train)
