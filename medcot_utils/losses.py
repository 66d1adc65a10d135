"""The held-out loss, one number a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def row_losses(model: PreTrainedModel, rows: Dataset, batch_size: int, label: str) -> list[dict[str, Any]]:
    """Negative log-likelihood of each row's labels: one record {model, id, nll (nats, summed), tokens} per row.

    Rows carry input_ids and labels (-100 where no loss is taken), as notebook 03 makes them."""
    import torch
    from tqdm.auto import tqdm

    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    records: list[Any] = [None] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc=f"held-out loss, {label}", unit="batch"):
        chosen = order[start : start + batch_size]
        batch = [rows[i] for i in chosen]
        ids, labels, mask = (tensor.to(model.device) for tensor in _pad_right(batch))
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for position, i in enumerate(chosen):
            wanted = labels[position, 1:] != -100
            # Only the label positions become float32: a full copy of the logits would be the largest tensor of the step.
            picked = logits[position, :-1][wanted].float()
            nll = torch.nn.functional.cross_entropy(picked, labels[position, 1:][wanted], reduction="sum")
            records[i] = {"model": label, "id": str(rows[i]["id"]), "nll": float(nll), "tokens": int(wanted.sum())}
    return records


def _pad_right(batch: Sequence[dict[str, Any]]) -> tuple[Any, Any, Any]:
    from torch import tensor
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([tensor(row["input_ids"]) for row in batch], batch_first=True)
    labels = pad_sequence([tensor(row["labels"]) for row in batch], batch_first=True, padding_value=-100)
    mask = pad_sequence([tensor([1] * len(row["input_ids"])) for row in batch], batch_first=True)
    return ids, labels, mask
