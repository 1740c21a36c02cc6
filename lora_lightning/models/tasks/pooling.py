"""Texts to unit vectors: what the tasks on sentence embeddings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.models.tasks.base import MODEL_INPUTS, Batch

Pooling = Literal["mean", "first"]
POOLINGS = ("mean", "first")


def embed(model: Callable[..., Any], batch: Batch, pooling: Pooling) -> Tensor:
    """Unit vectors of a batch's texts, side by side: (sides, examples, width).

    "mean" averages the last hidden states over the attention mask, as most sentence encoders do; "first" takes the
    first token's.
    """
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    hidden: Tensor = model(**inputs).last_hidden_state
    if pooling == "first":
        pooled = hidden[:, 0]
    else:
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
    vectors = F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
    return vectors.reshape(int(batch["sides"]), -1, vectors.shape[-1])


def example_pairs(size: int, length: int) -> dict[str, Tensor]:
    """A batch of `size` pairs of texts of `length` tokens, all zeros, with a score each."""
    ids = torch.zeros(2 * size, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "sides": torch.tensor(2), "labels": torch.zeros(size)}
