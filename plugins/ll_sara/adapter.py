"""SaRAAdapter: some entries of one layer's weight, by their places.

Hu et al., 2024, arXiv:2409.06633.

    M = |P0| < theta,   P = P0 outside M and p on M,   y = P x + b
    loss + lambda sum_l |P_l * M_l|_*,   subgradient (U V^T) * M of the singular vectors of P_l * M_l
    once on the way:   M <- M * (|P| < theta); what leaves M keeps its value

    paper  here      shape
    P0     weight    (d_out, d_in)   frozen
    M      indices   (n,)            places in the flattened weight, ascending; their number is fixed
    p      values    (n,)            trained, start at P0
    -      origin    (n,)            P0 on M, so that P0 + (p - origin) is exact at the start
    -      live      (n,)            False where an entry has left M
    -      held      (n,)            the value that it keeps
    theta  limit     ()

Departs from the paper: tensors keep their size when M shrinks. Weights of adapted layers alone have entries; norms and
biases have none. Convolutions, embeddings and stacked experts (one matrix) work alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, write_values
from lora_lightning.adapters.from_weight import forward_from_weight
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.distributed import whole
from lora_lightning.errors import SettingsError


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of singular values of (*lead, m, n), over all matrices; the gradient is U V^T of those that are not zero."""
    U, S, Vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    rounding = torch.finfo(S.dtype).eps * max(matrix.shape[-2:]) * S.amax(-1, keepdim=True)
    G = (U * (rounding < S).unsqueeze(-2)) @ Vh
    norm: Tensor = (G * matrix).sum()
    return norm


class SaRAAdapter(Adapter):
    """The trained entries of one layer.

    Args:
        base: the layer; its entries of least size are taken.
        entries: how many; 0 for those below `threshold`.
        threshold: theta; None for the size of the first entry that is not taken.

    Raises:
        SettingsError: no entry is below the threshold, or the weight has no values yet.
    """

    additive = True
    indices: Tensor
    origin: Tensor
    live: Tensor
    held: Tensor
    limit: Tensor

    def __init__(self, base: BaseLayer, entries: int, threshold: float | None) -> None:
        super().__init__()
        self.shape = (*base.lead, base.d_out, base.d_in)
        weight = base.weight(base.adapter_dtype).detach().flatten()
        if not entries:
            entries = number_below(base, threshold or 0.0)
        if not 0 < entries <= weight.numel():
            raise SettingsError(
                f"{entries} of the layer's {weight.numel()} entries would train; take a threshold above "
                f"{float(weight.abs().min()):.3g}, the smallest size, or leave the layer out."
            )
        order = weight.abs().argsort(stable=True)
        index = order[:entries].sort().values
        origin = weight[index]
        self.values = nn.Parameter(origin.clone())
        small = weight.numel() < 2**31
        self.register_buffer("indices", index.to(torch.int32 if small else torch.int64))
        self.register_buffer("origin", origin)
        self.register_buffer("live", torch.ones_like(index, dtype=torch.bool))
        self.register_buffer("held", origin.clone())
        limit = torch.full_like(weight[0], torch.inf if threshold is None else threshold)
        if threshold is None and entries < weight.numel():
            limit = weight.abs().index_select(0, order[entries : entries + 1])[0]
        self.register_buffer("limit", limit)

    def reset(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing here is random
        """The weight's own values, all of which train."""
        for target in (self.values, self.held):
            write_values(target, self.origin)
        self.live.fill_(True)

    def current(self, values: Tensor) -> Tensor:
        """What the entries are now, (n,), for the trained `values` in full."""
        return torch.where(self.live, values, self.held)

    def placed(self, entries: Tensor) -> Tensor:
        """A matrix (*lead, d_out, d_in) with `entries` (n,) in their places, and zeros."""
        return entries.new_zeros(math.prod(self.shape)).index_add(0, self.indices, entries).view(self.shape)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """P; entries outside M are those of the weight bit for bit."""
        return weight + self.placed((self.current(self.values) - self.origin).to(weight.dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The layer with that weight, which is formed again in backward."""
        return forward_from_weight(base, x, self.merged_weight)

    def penalty(self) -> Tensor:
        """|P * M|_* of the entries that train."""
        values = whole(self.values)
        return nuclear_norm(self.placed(torch.where(self.live, values, 0.0)))

    def select_again(self, values: Tensor) -> None:
        """Leave only those of the entries that train whose size is below theta still; the others keep their value."""
        now = self.current(values.detach())
        self.held.copy_(now)
        self.live.logical_and_(now.abs() < self.limit)

    def extra_repr(self) -> str:
        """How many entries train for `print(model)`."""
        return f"entries={len(self.indices)} of {math.prod(self.shape)}"


def number_below(base: BaseLayer, threshold: float) -> int:
    """How many entries of a layer are smaller than `threshold`.

    Raises:
        SettingsError: the weight has no values yet.
    """
    if base.device.type == "meta":
        raise SettingsError(
            f"threshold is {threshold:g}; how many entries are below it is known from the weights alone, which are not "
            "loaded here. Give density, the fraction of entries, in its place."
        )
    return int((base.weight(base.adapter_dtype).detach().abs() < threshold).sum())
