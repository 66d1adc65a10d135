"""Join the rows of a micro-batch behind the tokens that all begin with: on a CPU, where arithmetic is what takes time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from medcot_utils.models.prefix import TokenizedRow, attends_to_all, count_shared_unlabeled
from medcot_utils.models.static_cache import GROUPED


def can_join(model: PreTrainedModel) -> bool:
    """Return whether a model trains from joined rows: on a CPU, with attention that takes any mask and looks at all before."""
    config = model.config.get_text_config()
    return model.device.type == "cpu" and config._attn_implementation in ("sdpa", GROUPED) and attends_to_all(config)


class JoinedRows:
    """Collate the rows of a micro-batch as one row, for the loss "nll" of TRL's trainer.

    The template, a third of a row, is run once for all of them, and logits are made only where there is a label. Each token
    attends to what its own row has before it, at the places it has there, so loss and gradients are those of padded rows."""

    def __call__(self, batch: Sequence[TokenizedRow]) -> dict[str, torch.Tensor]:
        """Return the joined row's tensors: ids, positions and labels (1, tokens), its mask (1, 1, tokens, tokens), the places
        that have a label, (labels,), and those labels, (1, labels)."""
        shared = count_shared_unlabeled(batch)
        first = batch[0]
        ids, labels, positions, owners = first["input_ids"][:shared], [-100] * shared, list(range(shared)), [-1] * shared
        targets = list(labels)  # of the next token, which for a row's last one is none
        for owner, row in enumerate(batch):
            own = len(row["input_ids"]) - shared
            ids, labels = ids + row["input_ids"][shared:], labels + row["labels"][shared:]
            targets += [*row["labels"][shared + 1 :], -100]
            positions += range(shared, shared + own)
            owners += [owner] * own
        owner = torch.tensor(owners)
        mask = ((owner[:, None] == owner) | (owner == -1)).tril()
        target = torch.tensor(targets)
        labeled = (target != -100).nonzero().squeeze(1)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": mask[None, None],
            "labels": torch.tensor([labels]),  # which the trainer counts
            "logits_to_keep": labeled,
            "shift_labels": target[labeled][None],
        }
