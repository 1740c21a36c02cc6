"""Lengths of completions, as preference losses average over them."""

from __future__ import annotations

from torch import Tensor

from lora_lightning.models.tasks.base import IGNORED


def completion_lengths(labels: Tensor) -> Tensor:
    """Number of labelled tokens that are predicted, (rows,), at least 1.

    Args:
        labels: (rows, tokens), -100 where there is none; a row's first token is never predicted.
    """
    return (labels[:, 1:] != IGNORED).sum(-1).clamp_min(1)
