"""Single entries of a frozen weight: which are smallest, and an adapter of them, by their places.

W' = W outside the places and p on them

W      weight    (*lead, d_out, d_in)   frozen
-      indices   (n,)   places in the flattened weight, ascending; their number is fixed
p      values    (n,)   trained, start at W there
-      origin    (n,)   W on the places, so that W + (p - origin) is exact at the start
-      live      (n,)   False where an entry has stopped training
-      held      (n,)   the value that it keeps
-      limit     ()     size that an entry which is chosen again must be below
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, write_values
from lora_lightning.adapters.from_weight import forward_from_weight
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError


def kept_mask(scores: Tensor, removed: Tensor) -> Tensor:
    """True but for the `removed` entries of least score of each matrix (*lead, d_out, d_in); of equal ones the first.

    Args:
        scores: any numbers.
        removed: a whole number, as a tensor of shape (), so that it can change in a compiled step.
    """
    flat = scores.flatten(-2)
    order = flat.argsort(dim=-1, stable=True)
    places = torch.arange(flat.shape[-1], device=flat.device).expand_as(order)
    return (torch.empty_like(order).scatter_(-1, order, places) >= removed).view(scores.shape)


class EntriesAdapter(Adapter):
    """Trains some entries of one layer's weight.

    Args:
        base: the layer; its entries of least size are taken.
        entries: how many; 0 for those below `threshold`.
        threshold: None for the size of the first entry that is not taken.

    Raises:
        SettingsError: no entry is below the threshold, or the weight has no values yet.
    """

    additive = True
    replaces_weight = True
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
        """The weight with the values in their places; all others are those of the weight bit for bit."""
        return weight + self.placed((self.current(self.values) - self.origin).to(weight.dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The layer with that weight, which is formed again in backward."""
        return forward_from_weight(base, x, self.merged_weight)

    def select_again(self, values: Tensor) -> None:
        """Leave only those of the entries that train whose size is below `limit` still; the others keep their value."""
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
