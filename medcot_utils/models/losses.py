"""Compute the held-out loss, row by row."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.models.prefix import TokenizedRow, begin_with, count_shared, read_prefix

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel

_LOGITS_BYTES = 2e9
# The model's 16-bit logits, and a 32-bit copy, which accelerate's mixed precision returns after training.
_BYTES_PER_LOGIT = 6


class RowLoss(TypedDict):
    """Hold one model's loss on one row. `nll`: sum of the labels' negative log-likelihoods, in nats; `tokens`: their number."""

    model: str
    id: str
    nll: float
    tokens: int


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run blocks that torch has compiled as they were written.

    Without gradients, torch would compile them again. At 8B on an H200 that took 20 s, and the loss of 20 rows takes 2 s."""
    import torch

    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@uncompiled()
def row_losses(model: PreTrainedModel, rows: Dataset, batch_size: int, label: str) -> list[RowLoss]:
    """Return the loss of each tokenized row (see `TokenizedRow`), in the rows' order; `label` names the model.

    On a CPU, where arithmetic takes most of the time, tokens without labels that all rows begin with run once. A batch has at
    most `batch_size` rows, and fewer if its logits would take more than 2 GB. That is room for two rows of 1,018 tokens with
    Llama 3's vocabulary of 128,256."""
    from tqdm.auto import tqdm

    model.eval()
    lengths = [len(ids) for ids in rows["input_ids"]]
    batches = split_into_batches(lengths, batch_size, model.config.get_text_config().vocab_size)
    shared = _count_shared(rows) if model.device.type == "cpu" else 0
    prefix = read_prefix(model, rows[0]["input_ids"][:shared]) if shared else None
    records: dict[int, RowLoss] = {}
    for chosen in tqdm(batches, desc=f"held-out loss, {label}", unit="batch"):
        found = batch_losses(model, [rows[i] for i in chosen], model.device, prefix)
        for i, (nll, tokens) in zip(chosen, found, strict=True):
            records[i] = RowLoss(model=label, id=str(rows[i]["id"]), nll=nll, tokens=tokens)
    return [records[i] for i in range(len(rows))]


def mean_loss(records: Sequence[RowLoss]) -> float:
    """Return the loss over all tokens of the rows, in nats per token."""
    return sum(record["nll"] for record in records) / sum(record["tokens"] for record in records)


def split_into_batches(lengths: Sequence[int], batch_size: int, vocab_size: int) -> list[list[int]]:
    """Return the rows' indices, longest first, in batches of at most `batch_size` whose logits fit."""
    left = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batches = []
    while left:
        fitting = int(_LOGITS_BYTES // (_BYTES_PER_LOGIT * lengths[left[0]] * vocab_size))
        size = max(1, min(batch_size, fitting))
        batches.append(left[:size])
        left = left[size:]
    return batches


def _count_shared(rows: Dataset) -> int:
    """Return how many tokens all rows share at the beginning, without those whose logits are needed."""
    unlabeled = [next((place for place, label in enumerate(labels) if label != -100), len(labels)) for labels in rows["labels"]]
    return min(count_shared(rows["input_ids"]), max(0, min(unlabeled, default=0) - 1))


def batch_losses(
    model: PreTrainedModel, batch: Sequence[TokenizedRow], device: torch.device, prefix: DynamicCache | None = None
) -> list[tuple[float, int]]:
    """Return (nll in nats, number of labels) of each row. Logits are freed on return, before the next batch needs memory.

    Args:
        prefix: what `read_prefix` returns for the tokens without labels that all rows begin with."""
    import torch
    from transformers import DynamicCache

    ids, labels, mask = (tensor.to(device) for tensor in _pad_right(batch))
    positions, given, shared = torch.arange(ids.shape[1] - 1, device=device), {}, 0
    if prefix is not None:
        shared = prefix.get_seq_length()
        given = {"past_key_values": begin_with(prefix, len(ids), DynamicCache(config=model.config))}
    if ids.device.type == "cpu":  # logits take a quarter of the time on a CPU, so only those of labels are computed
        positions = (labels[:, 1:] != -100).any(dim=0).nonzero().squeeze(1)
        given |= {"logits_to_keep": positions - shared}
    with torch.inference_mode():
        logits = model(input_ids=ids[:, shared:], attention_mask=mask, use_cache=prefix is not None, **given).logits
    found = []
    for own_logits, own_labels in zip(logits, labels[:, positions + 1], strict=True):
        wanted = own_labels != -100
        # Only the label positions become float32, because a full copy of the logits would be the largest tensor of the step.
        picked = own_logits[: len(wanted)][wanted].float()
        nll = torch.nn.functional.cross_entropy(picked, own_labels[wanted], reduction="sum")
        found.append((float(nll), int(wanted.sum())))
    return found


def _pad_right(batch: Sequence[TokenizedRow]) -> tuple[Tensor, Tensor, Tensor]:
    from torch import tensor
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([tensor(row["input_ids"]) for row in batch], batch_first=True)
    labels = pad_sequence([tensor(row["labels"]) for row in batch], batch_first=True, padding_value=-100)
    mask = pad_sequence([tensor([1] * len(row["input_ids"])) for row in batch], batch_first=True)
    return ids, labels, mask
