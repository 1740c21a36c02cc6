"""Tokens that a model cannot tell from others: their rows of the output layer are those of many tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.distributed import full_tensor
from lora_lightning.models.heads import output_embeddings
from lora_lightning.models.new_tokens import ExtendedLayer

CLOSE = 0.02
"""Distance of two rows, as a fraction of their length, below which no state tells them apart."""


@torch.no_grad()
def untrained_rows(model: nn.Module, ids: Iterable[int]) -> dict[int, int]:
    """How many other tokens have the same row of the output layer, by token; only those that share theirs.

    Rows that pretraining never reached are such: they are equal, or nearly zero. A model whose output layer stays as it
    is cannot learn to write one of these tokens and not the others.

    Args:
        model: a language model; sharded, all processes take part.
        ids: tokens.

    Returns:
        Nothing for a layer that trains, is adapted, or cannot be read, and for tokens with a row of their own.
    """
    layer = output_embeddings(model)
    own = set(layer.own_ids) if isinstance(layer, ExtendedLayer) else set()
    while isinstance(layer, ExtendedLayer):
        layer = layer.base
    if layer is None or isinstance(layer, AdaptedLayer):  # whose `weight` is the product, and may be sharded
        return {}
    weight = getattr(layer, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.requires_grad
        or weight.dim() != 2
        or not weight.is_floating_point()
        or weight.is_meta
    ):
        return {}
    rows = full_tensor(weight)
    lengths = rows.float().norm(dim=1)
    typical = lengths.median()
    found = {}
    for token in ids:
        if token in own or token >= len(rows):
            continue
        near = (rows - rows[token]).float().norm(dim=1) <= CLOSE * torch.maximum(lengths[token], CLOSE * typical)
        others = int(near.sum()) - 1
        if others > 0:
            found[token] = others
    return found
