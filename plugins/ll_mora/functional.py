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
from torch.nn import functional as F  # noqa: N812 - the field's usual name

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
    owner = owners(d_in, k, kind)
    first = torch.searchsorted(owner, torch.arange(k, device="cpu"))
    positions = torch.arange(table.shape[0], device="cpu")[:, None] + first
    return torch.where(positions < first + torch.bincount(owner, minlength=k), positions, d_in)


def shared_update(x: Tensor, square: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Decompressed M z, (..., d_out), for x (..., d_in) and the maps of `sources` and `owners`."""
    z = F.pad(x, (0, 1)).index_select(-1, inputs.flatten()).unflatten(-1, inputs.shape).sum(-2)
    return F.linear(z, square).index_select(-1, outputs)


def shared_rows(square: Tensor, inputs: Tensor, d_in: int) -> Tensor:
    """M compress as a matrix, (*lead, k, d_in)."""
    columns = square.repeat(*[1] * (square.dim() - 1), inputs.shape[0])
    return square.new_zeros(*square.shape[:-1], d_in + 1).index_add(-1, inputs.flatten(), columns)[..., :d_in]


def angles(blocks: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each block's angles, (blocks, k / 2), in float32 at least."""
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    frequency = 10000.0 ** (-2 * torch.arange(k // 2, device=like.device, dtype=wide) / k)
    turn = torch.arange(blocks, device=like.device, dtype=wide)[:, None] * frequency
    dtype = torch.promote_types(like.dtype, torch.float32)
    return turn.cos().to(dtype), turn.sin().to(dtype)


def rotated_update(x: Tensor, square: Tensor, d_out: int) -> Tensor:
    """[M R_1 x_1 ... M R_n x_n], cut or repeated to (..., d_out), for x (..., d_in)."""
    d_in, k = x.shape[-1], square.shape[-1]
    blocks = min(-(-d_in // k), -(-d_out // k))  # of those beyond nothing is left
    padded = torch.cat([x, x[..., : k - 1]], dim=-1)[..., : blocks * k].unflatten(-1, (blocks, k))
    cosine, sine = angles(blocks, k, x)
    one, two = padded.chunk(2, dim=-1)
    z = torch.cat([one * cosine - two * sine, two * cosine + one * sine], dim=-1).to(x.dtype)
    return _fitted(F.linear(z, square).flatten(-2), d_out, -1)


def rotated_weight(square: Tensor, d_in: int, d_out: int) -> Tensor:
    """The matrix (*lead, d_out, d_in) of `rotated_update`: blocks M R_i on the diagonal, their padding folded back."""
    k, n = square.shape[-1], -(-d_in // square.shape[-1])
    blocks = min(n, -(-d_out // k))
    cosine, sine = (part[:, None, :].to(square.dtype) for part in angles(blocks, k, square))
    one, two = square.unsqueeze(-3).chunk(2, dim=-1)
    turned = torch.cat([one * cosine + two * sine, two * cosine - one * sine], dim=-1)  # (*lead, blocks, k, k)
    diagonal = torch.eye(blocks, n, dtype=square.dtype, device=square.device)[:, None, :, None]
    whole = (diagonal * turned.unsqueeze(-2)).flatten(-4, -3).flatten(-2)
    weight, folded = whole[..., :d_in], whole[..., d_in:]
    return _fitted(weight + F.pad(folded, (0, d_in - folded.shape[-1])), d_out, -2)


def _fitted(tensor: Tensor, size: int, axis: int) -> Tensor:
    """The tensor cut to `size` along an axis, or repeated up to it."""
    times = -(-size // tensor.shape[axis])
    return torch.cat([tensor] * times, dim=axis).narrow(axis, 0, size)
