"""Factors of grouped convolutions, here and in peft's format.

    here    A (r, in/g, *k)      each group of outputs has its own rows of B and sees its own input channels
            B (out, r)
    peft    A (g r, in, *k)      a plain convolution, which sees all input channels
            B (out, r, 1, ...)   a grouped one: outputs of group j see rows j r to (j + 1) r of A

What is made here is a block diagonal there. What peft has trained is one only where its A is zero for the channels of
other groups; any other update is no weight of a grouped convolution, and peft cannot merge it either.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_group(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors as they are here, of peft's A (R, in, *k) and B (out, R / groups, ...).

    Of rank R / groups where every group has the same rows of A, else of rank R, with zeros in B.

    Returns:
        A (r, in/groups, *k) and B (out, r, ...); None where a group sees the channels of another one.
    """
    groups = A.shape[0] // B.shape[1]
    blocks = A.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))  # (groups, rows, groups, channels, *k)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if not torch.equal(block_diagonal(own), A):
        return None
    if all(torch.equal(rows, own[0]) for rows in own):
        return own[0], B
    wide = B.new_zeros(groups, B.shape[0] // groups, groups, *B.shape[1:])
    for group, outputs in enumerate(B.unflatten(0, (groups, -1))):
        wide[group, :, group] = outputs
    return own.flatten(0, 1), wide.flatten(2, 3).flatten(0, 1)


def block_diagonal(own: Tensor) -> Tensor:
    """Kernels of each group, (groups, r, in/groups, *k), as peft's, (groups * r, in, *k)."""
    groups = len(own)
    blocks = own.new_zeros(groups, own.shape[1], groups, *own.shape[2:])
    for group in range(groups):
        blocks[group, :, group] = own[group]
    return blocks.flatten(2, 3).flatten(0, 1)
