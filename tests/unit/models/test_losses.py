"""The held-out loss: the model's own whatever the batch, within a bound of memory."""

from __future__ import annotations

import weakref

import pytest

from medcot_utils import data
from medcot_utils.config import load_config
from medcot_utils.models import losses
from medcot_utils.models.losses import row_losses

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])


@pytest.fixture(scope="module")
def model_and_rows():
    from medcot_utils.models.engine import get_engine

    model, tokenizer = get_engine(CONFIG.model).load(CONFIG.model)
    rows = data.add_text_column(data.load_rows(CONFIG.dataset).select(range(7)), tokenizer.eos_token)
    rows, _ = data.tokenize_rows(rows, tokenizer, CONFIG.dataset, 1024, True)
    assert len({len(ids) for ids in rows["input_ids"]}) > 3, "rows of one length would hide a padding fault"
    return model, rows


@pytest.mark.model
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_row_losses_are_the_models_own_whatever_the_batch(model_and_rows, batch_size):
    import torch

    model, rows = model_and_rows
    records = row_losses(model, rows, batch_size, "base")
    assert [record["id"] for record in records] == rows["id"]
    for record, row in zip(records, rows, strict=True):
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            own = model.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        assert record["tokens"] == int((labels[:, 1:] != -100).sum()) < len(row["input_ids"]) - 1
        assert record["nll"] / record["tokens"] == pytest.approx(float(own), abs=1e-4)
        assert record["model"] == "base"


@pytest.mark.model
def test_what_all_rows_begin_with_is_run_once(model_and_rows, monkeypatch):
    model, rows = model_and_rows
    whole = [len(ids) for ids in rows["input_ids"]]
    forward, shapes = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **given: shapes.append(tuple(given["input_ids"].shape)) or forward(**given))
    row_losses(model, rows, 7, "base")
    (one, shared), rest = shapes
    assert one == 1 and shared > 50 and rest == (7, max(whole) - shared)


@pytest.mark.model
def test_nothing_is_compiled_for_the_loss_of_a_few_rows(model_and_rows, monkeypatch):
    import torch

    model, rows = model_and_rows
    compiled = []
    counting = torch.compile(model.forward, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    monkeypatch.setattr(model, "forward", counting)
    row_losses(model, rows, 7, "base")
    assert not compiled


@pytest.mark.model
def test_no_rows_have_no_losses(model_and_rows):
    model, rows = model_and_rows
    assert row_losses(model, rows.select([]), 2, "base") == []


@pytest.mark.model
def test_a_beginning_with_labels_is_run_with_each_row(model_and_rows):
    model, rows = model_and_rows
    full = rows.map(lambda row: {"labels": row["input_ids"]})
    alone = [record for i in range(len(full)) for record in row_losses(model, full.select([i]), 1, "base")]
    together = row_losses(model, full, 3, "base")
    assert [one["tokens"] for one in together] == [len(ids) - 1 for ids in full["input_ids"]]
    assert [one["nll"] for one in together] == pytest.approx([one["nll"] for one in alone], rel=1e-5)


@pytest.mark.model
def test_row_losses_hold_the_logits_of_one_batch_at_a_time(model_and_rows, monkeypatch):
    model, rows = model_and_rows
    forward, made = model.forward, []

    def watched(**arguments):
        assert not [logits for logits in made if logits() is not None], "the batch before still holds its logits"
        outputs = forward(**arguments)
        made.append(weakref.ref(outputs.logits))
        return outputs

    monkeypatch.setattr(model, "forward", watched)
    row_losses(model, rows, 2, "base")
    assert len(made) == 5, "seven rows, two at a time, after what they all begin with"


@pytest.mark.model
def test_loss_batches_shrink_if_their_logits_are_too_large(model_and_rows, monkeypatch):
    model, rows = model_and_rows
    together = row_losses(model, rows, 4, "base")
    longest = max(len(ids) for ids in rows["input_ids"])
    monkeypatch.setattr(losses, "_LOGITS_BYTES", 2 * losses._BYTES_PER_LOGIT * longest * model.config.vocab_size)
    forward, shapes = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **inputs: shapes.append(inputs["input_ids"].shape) or forward(**inputs))
    apart = row_losses(model, rows, 4, "base")
    shared = shapes[0][1]
    assert shapes[1] == (2, longest - shared), "two of the longest rows fit, not four"
    assert max(count * (shared + length) for count, length in shapes[1:]) <= 2 * longest
    assert [record["id"] for record in apart] == [record["id"] for record in together]
    assert [record["nll"] for record in apart] == pytest.approx([record["nll"] for record in together], rel=1e-5)

    monkeypatch.setattr(losses, "_LOGITS_BYTES", 1)
    assert len(row_losses(model, rows, 4, "base")) == len(rows), "a row that is too long by itself is still taken, alone"
    assert shapes[-len(rows) :] == [(1, length - shared) for length in sorted(map(len, rows["input_ids"]), reverse=True)]
