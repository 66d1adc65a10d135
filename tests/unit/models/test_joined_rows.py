"""Joined rows: the loss and the gradients of padded ones, from fewer tokens, on models that allow it."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES
from tiny_trainer import CONFIG, adapter_weights, largest_difference, losses, make_trainer, plan, trained
from transformers import AutoModelForCausalLM

from medcot_utils import data
from medcot_utils.config import load_config
from medcot_utils.models import transformers_engine
from medcot_utils.models.engine import get_engine
from medcot_utils.models.joined_rows import JoinedRows, can_join

pytestmark = pytest.mark.model

PLAIN = load_config("smoke", ["model.load_in_4bit=false"])


@pytest.fixture(scope="module", params=["completion", "full"])
def model_and_rows(request):
    model, tokenizer = get_engine(PLAIN.model).load(PLAIN.model)
    rows = data.add_text_column(data.load_rows(PLAIN.dataset).select(range(4)), tokenizer.eos_token)
    settings = load_config("smoke", [f"dataset.loss_on={request.param}"]).dataset
    rows, _ = data.tokenize_rows(rows, tokenizer, settings, 1024, True)
    assert len({len(ids) for ids in rows["input_ids"]}) > 2, "rows of one length would hide a fault"
    return model, list(rows.select_columns(["input_ids", "labels"])), request.param


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def test_loss_and_gradients_are_those_of_rows_alone(model_and_rows):
    model, rows, _ = model_and_rows
    labels = sum(label != -100 for row in rows for label in row["labels"][1:])
    apart = 0.0
    for row in rows:
        loss = model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), num_items_in_batch=labels
        ).loss
        loss.backward()
        apart += loss.item()
    expected = gradients(model)
    joined = JoinedRows()(rows)
    assert joined["shift_labels"].shape == (1, labels)
    loss = model(**joined, num_items_in_batch=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(apart, abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-3, msg=name)


def test_what_rows_begin_with_stands_once(model_and_rows):
    _, rows, _ = model_and_rows
    whole, joined = sum(len(row["input_ids"]) - 1 for row in rows), JoinedRows()(rows)
    assert whole - joined["input_ids"].numel() > 3 * 50
    again = JoinedRows()(rows + rows)
    assert again["input_ids"].tolist() == joined["input_ids"].tolist(), "a row that stands there needs no place of its own"
    assert again["labels"].numel() == 2 * joined["labels"].numel()


def test_a_row_alone_is_itself(model_and_rows):
    _, rows, _ = model_and_rows
    joined, length = JoinedRows()(rows[:1]), len(rows[0]["input_ids"]) - 1
    assert joined["input_ids"].tolist() == [rows[0]["input_ids"][:-1]]
    assert joined["position_ids"].tolist() == [list(range(length))]
    assert torch.equal(joined["attention_mask"][0, 0], torch.ones(length, length).tril().bool())


def test_training_with_joined_rows_is_training_with_padded_ones(tmp_path, monkeypatch):
    joined = trained(tmp_path / "joined", plans=[plan()])
    assert isinstance(joined.data_collator, JoinedRows)
    monkeypatch.setattr(transformers_engine, "can_join", lambda model: False)
    padded = trained(tmp_path / "padded", plans=[plan()])
    assert not isinstance(padded.data_collator, JoinedRows)
    assert losses(joined) == pytest.approx(losses(padded), abs=2e-4)
    assert largest_difference(adapter_weights(joined), adapter_weights(padded)) < 2e-4


def test_the_log_counts_no_places_of_a_mask(tmp_path, monkeypatch):
    joined = trained(tmp_path / "joined", load_config("smoke", ["training.max_steps=2", "training.eval_steps=1"]))
    entries = joined.state.log_history
    assert any("eval_loss" in entry for entry in entries) and any("loss" in entry for entry in entries)
    assert not [name for entry in entries for name in entry if "num_tokens" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_attend_to_all_before_are_joined(family, tmp_path):
    FAMILIES[family].make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert can_join(model) is not family.startswith("gemma"), "every second layer of a Gemma looks at a window"
    if can_join(model):
        start, rows = list(range(5, 45)), [list(range(7 * row, 7 * row + 20 + row)) for row in range(1, 4)]
        rows = [{"input_ids": start + ids, "labels": [-100] * 42 + ids[2:]} for ids in rows]
        with torch.no_grad():
            apart = [model(**{name: torch.tensor([ids]) for name, ids in row.items()}, num_items_in_batch=1).loss for row in rows]
            joined = model(**JoinedRows()(rows), num_items_in_batch=1).loss
        assert joined.item() == pytest.approx(sum(loss.item() for loss in apart), rel=1e-5)
    model.set_attn_implementation("eager")
    assert not can_join(model), "eager attention adds its mask, which here says yes or no"


def test_the_trainer_gets_the_engines_collator(tmp_path):
    assert isinstance(make_trainer(tmp_path, CONFIG).data_collator, JoinedRows)
