"""Rows to one batch of tensors, padded to the longest row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


@dataclass(frozen=True)
class Collate:
    """Collation of tokenised rows; whatever is not in `columns` stays out of the batch.

    Lists are padded on the right: token ids with `pad_token_id`, labels with -100, masks with 0.
    """

    pad_token_id: int
    columns: Sequence[str] = MODEL_INPUTS

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One tensor per column: int64, float32 for numbers on a scale."""
        padding = {"input_ids": self.pad_token_id, "labels": -100}
        names = [name for name in self.columns if name in rows[0]]
        return {name: _tensor([row[name] for row in rows], padding.get(name, 0)) for name in names}


def _tensor(values: list[Any], padding: int) -> Tensor:
    if not isinstance(values[0], list):
        return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int64)
    width = max(map(len, values))
    return torch.tensor([row + [padding] * (width - len(row)) for row in values])
