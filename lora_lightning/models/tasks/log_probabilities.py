"""Log-probabilities of completions: what the preference losses and their reference are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.models.tasks.base import IGNORED


def completion_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's labelled tokens, given all tokens before them, summed: (rows,), float32 at least.

    Positions without a label cost no memory beyond the logits.

    Args:
        logits: (rows, tokens, vocabulary), of each token's successor.
        labels: (rows, tokens), -100 where there is none; a row's first token is never predicted.
    """
    following = labels[:, 1:]
    here = following != IGNORED
    scores = logits[:, :-1][here]
    dtype = torch.promote_types(scores.dtype, torch.float32)
    found = -F.cross_entropy(scores.to(dtype), following[here], reduction="none")
    return found.new_zeros(following.shape).masked_scatter(here, found).sum(-1)


def completion_lengths(labels: Tensor) -> Tensor:
    """Number of labelled tokens that are predicted, (rows,), at least 1."""
    return (labels[:, 1:] != IGNORED).sum(-1).clamp_min(1)
