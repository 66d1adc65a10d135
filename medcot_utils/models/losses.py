"""The held-out loss, one number a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_LOGITS_BYTES = 2e9
# In 16 bits as the model makes them, and once more in 32: what accelerate's mixed precision hands out after a training.
_BYTES_PER_LOGIT = 6


def row_losses(model: PreTrainedModel, rows: Dataset, batch_size: int, label: str) -> list[dict[str, Any]]:
    """Negative log-likelihood of each row's labels: one record {model, id, nll (nats, summed), tokens} per row.

    Rows carry input_ids and labels (-100 where no loss is taken), as notebook 03 makes them. A batch has at most `batch_size`
    rows, and fewer where its logits would take more than 2 GB (two rows of 1,018 tokens with Llama 3's 128,256 words)."""
    from tqdm.auto import tqdm

    model.eval()
    lengths = [len(ids) for ids in rows["input_ids"]]
    batches = _batches(lengths, batch_size, model.config.vocab_size)
    records: list[Any] = [None] * len(rows)
    for chosen in tqdm(batches, desc=f"held-out loss, {label}", unit="batch"):
        found = _batch_losses(model, [rows[i] for i in chosen])
        for i, (nll, tokens) in zip(chosen, found, strict=True):
            records[i] = {"model": label, "id": str(rows[i]["id"]), "nll": nll, "tokens": tokens}
    return records


def _batches(lengths: Sequence[int], batch_size: int, vocab_size: int) -> list[list[int]]:
    """The rows' indices, longest first, in batches of `batch_size`; of fewer where their logits would take too much."""
    left = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batches = []
    while left:
        fitting = int(_LOGITS_BYTES // (_BYTES_PER_LOGIT * lengths[left[0]] * vocab_size))
        size = max(1, min(batch_size, fitting))
        batches.append(left[:size])
        left = left[size:]
    return batches


def _batch_losses(model: PreTrainedModel, batch: Sequence[dict[str, Any]]) -> list[tuple[float, int]]:
    """(nll in nats, labels) of each row. A function, so that its logits are given back before the next batch makes its own."""
    import torch

    ids, labels, mask = (tensor.to(model.device) for tensor in _pad_right(batch))
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for own_logits, own_labels in zip(logits, labels, strict=True):
        wanted = own_labels[1:] != -100
        # Only the label positions become float32: a full copy of the logits would be the largest tensor of the step.
        picked = own_logits[:-1][wanted].float()
        nll = torch.nn.functional.cross_entropy(picked, own_labels[1:][wanted], reduction="sum")
        found.append((float(nll), int(wanted.sum())))
    return found


def _pad_right(batch: Sequence[dict[str, Any]]) -> tuple[Any, Any, Any]:
    from torch import tensor
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([tensor(row["input_ids"]) for row in batch], batch_first=True)
    labels = pad_sequence([tensor(row["labels"]) for row in batch], batch_first=True, padding_value=-100)
    mask = pad_sequence([tensor([1] * len(row["input_ids"])) for row in batch], batch_first=True)
    return ids, labels, mask
