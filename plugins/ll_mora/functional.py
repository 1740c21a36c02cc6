"""MoRA's equations as pure functions.

Jiang et al., 2024, arXiv:2405.12130, equations 6 (sharing) and 9 (rotation); contiguous groups are those of the
authors' code (its types 2 to 4).

    y = W x + decompress(M compress(x))

    k = floor(sqrt((d_in + d_out) r) + 1/2)     at most the smaller side; even for rotations
    n = ceil(d_in / k)                          blocks of an input, padded with its own first entries

    sharing    z_j = sum of the entries that map to j,  u = M z,  y_o = u at the entry that o maps to
    rotation   z_i = R_i x_i for each block i,          u_i = M z_i,  y = [u_1 ... u_n], cut or repeated

    R_i turns entries l and l + k/2 of a block by the angle i 10000^(-2 l / k).

    paper  here       shape (out, in as nn.Linear stores it)
    M      square     (k, k)            trained, zero at the start
    r      rank       the rank of the LoRA with as many numbers
    r hat  k
"""

from __future__ import annotations

import torch
from torch import Tensor

MAPS = {
    "modulo": ("modulo", "modulo"),
    "groups": ("groups", "groups"),
    "groups-modulo": ("groups", "modulo"),
    "modulo-groups": ("modulo", "groups"),
}
"""How inputs and outputs share entries: the authors' types 1 to 4, in the order in which stages go through them."""


def width(d_in: int, d_out: int, rank: int, even: bool) -> int:
    """Side k of the square matrix; 0 where an even one does not fit."""
    k = min(int(((d_in + d_out) * rank) ** 0.5 + 0.5), d_in, d_out)
    return k // 2 * 2 if even else k


def owners(size: int, k: int, kind: str) -> Tensor:
    """Which of k entries each of `size` positions maps to, (size,): remainders, or k groups of neighbours."""
    at = torch.arange(size, device="cpu")
    if kind == "modulo":
        return at % k
    small, large = divmod(size, k)  # the first `large` groups have one position more
    return torch.where(at < large * (small + 1), at // (small + 1), large + (at - large * (small + 1)) // small)


def sources(d_in: int, k: int, kind: str) -> Tensor:
    """Positions that are summed into each of k entries, (ceil(d_in / k), k); d_in stands for none."""
    table = torch.arange(-(-d_in // k) * k, device="cpu").view(-1, k)
    if kind == "modulo":
        return torch.where(table < d_in, table, table - d_in)
    counts = torch.bincount(owners(d_in, k, kind), minlength=k)
    row = torch.arange(len(table), device="cpu")[:, None]
    return torch.where(row < counts, counts.cumsum(0) - counts + row, d_in)


def rotated(x: Tensor, k: int, blocks: int) -> Tensor:
    """R_i x_i of the first blocks, (..., blocks, k), for x (..., d_in); angles in float32 at least."""
    padded = torch.cat([x, x[..., : k - 1]], dim=-1)[..., : blocks * k].unflatten(-1, (blocks, k))
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    frequency = 10000.0 ** (-2 * torch.arange(k // 2, device=x.device, dtype=wide) / k)
    angle = torch.arange(blocks, device=x.device, dtype=wide)[:, None] * frequency
    dtype = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    one, two = padded.chunk(2, dim=-1)
    return torch.cat([one * cosine - two * sine, two * cosine + one * sine], dim=-1).to(x.dtype)


def fitted(u: Tensor, size: int) -> Tensor:
    """U cut along its last axis to `size`, or repeated up to it."""
    return torch.cat([u] * -(-size // u.shape[-1]), dim=-1)[..., :size]
