"""lm-eval's harness for a CPU: all options follow their question in one row, and only option tokens get logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from medcot_utils.models.joined_rows import join_rows
from medcot_utils.models.prefix import TokenizedRow

_ROWS_FOR_ONE = 4  # this many joined rows are about as long as one of lm-eval's, since options share a question's tokens


class JoinedHarness(HFLM):
    """Compute log-likelihoods from joined rows. They equal lm-eval's own up to rounding."""

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return for each request (log-likelihood of the continuation in nats, whether greedy decoding would write it).

        A request holds its text, the token ids of its context, and those of its continuation. A row longer than the model's
        context loses its beginning, as in lm-eval."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        neighbors = sorted(range(len(rows)), key=lambda index: rows[index]["input_ids"])
        found: dict[int, tuple[float, bool]] = {}
        size = _ROWS_FOR_ONE * self.batch_size
        for start in range(0, len(rows), size):
            chosen = neighbors[start : start + size]
            found |= zip(chosen, self._read([rows[index] for index in chosen]), strict=True)
        return [found[index] for index in range(len(rows))]

    def _row(self, context: list[int], continuation: list[int]) -> TokenizedRow:
        ids = (context + continuation)[-(self.max_length + 1) :]
        return {"input_ids": ids, "labels": [-100] * (len(ids) - len(continuation)) + continuation}

    def _read(self, rows: list[TokenizedRow]) -> list[tuple[float, bool]]:
        joined, labels, owners = join_rows(rows)
        with torch.inference_mode():
            logits = self.model(**joined).logits[0]
            likelihoods = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        each = likelihoods.gather(1, labels[:, None]).squeeze(1)
        greedy = likelihoods.argmax(dim=-1) == labels
        return [(float(each[owners == row].sum()), bool(greedy[owners == row].all())) for row in range(len(rows))]
