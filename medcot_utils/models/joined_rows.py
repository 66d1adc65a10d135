"""Join rows so that their common beginnings run once, on a CPU, where arithmetic takes most of the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from transformers import PreTrainedModel

from medcot_utils.models.plain_weights import GROUPED
from medcot_utils.models.prefix import TokenizedRow, attends_to_all


def can_join(model: PreTrainedModel) -> bool:
    """Return whether a model can run joined rows: on a CPU, with attention to all earlier tokens that accepts any mask."""
    config = model.config.get_text_config()
    return model.device.type == "cpu" and config._attn_implementation in ("sdpa", GROUPED) and attends_to_all(config)


class JoinedRow(TypedDict):
    """Hold rows joined into one: the arguments of a model's forward pass."""

    input_ids: torch.Tensor  # (1, tokens)
    position_ids: torch.Tensor  # (1, tokens)
    attention_mask: torch.Tensor  # (1, 1, tokens, tokens), True where a token attends to another
    logits_to_keep: torch.Tensor  # (labels,), position of the token before each label


def join_rows(batch: Sequence[TokenizedRow]) -> tuple[JoinedRow, torch.Tensor, torch.Tensor]:
    """Join rows so that beginnings shared by several rows occur once. Each token attends to the earlier tokens of its own row.

    The last token of a row is left out, because no label follows it.

    Returns:
        The joined row, the labels (labels,) of its logits, and for each label the index (labels,) of its row."""
    tokens: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    after: dict[tuple[int, int], int] = {}  # (place in the joined row, next token): its place
    kept, labels, owners = [], [], []
    for owner, row in enumerate(batch):
        place, last = -1, len(row["input_ids"]) - 1
        for position, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            if label != -100 and position:
                kept.append(place)
                labels.append(label)
                owners.append(owner)
            if position == last:
                break
            if (place, token) not in after:
                after[place, token] = len(tokens)
                tokens.append(token)
                positions.append(position)
                parents.append(place)
            place = after[place, token]
    mask = torch.eye(len(tokens), dtype=torch.bool)
    for place, parent in enumerate(parents):
        if parent >= 0:
            mask[place] |= mask[parent]
    joined: JoinedRow = {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": mask[None, None],
        "logits_to_keep": torch.tensor(kept, dtype=torch.long),
    }
    return joined, torch.tensor(labels, dtype=torch.long), torch.tensor(owners, dtype=torch.long)


class JoinedRows:
    """Collate a micro-batch with `join_rows` for TRL's trainer, with loss_type "nll". The loss equals that of padded rows."""

    def __call__(self, batch: Sequence[TokenizedRow]) -> dict[str, torch.Tensor]:
        """Return the joined row and its labels (1, labels): `shift_labels` for transformers' loss, and `labels` for Trainer."""
        joined, labels, _ = join_rows(batch)
        return {**joined, "shift_labels": labels[None], "labels": labels[None]}
