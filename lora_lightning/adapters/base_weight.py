"""BaseWeight: what the weight of a base layer must hold now.

    weight = original + dense folded updates + noise     summed in float32 at least, rounded once

While it holds anything but the original, each process keeps its own shard of the original on the CPU, with the bias,
so that it comes back bit for bit. Folded updates with factors are not here: they are computed beside the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate, FoldedUpdate, Rule, fold
from lora_lightning.adapters.layers.base import BaseLayer, StackedBase
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.adapters.noise import Noise
from lora_lightning.distributed import as_shard_of, full_tensor, local, own_rows, put, shard_like
from lora_lightning.errors import AdapterStateError

AFTER_FINAL_MERGE = (
    "eject(model) makes it a plain model with the merged weights; for the adapter apart from them, load the base model "
    "anew, and the adapter with load_adapter."
)
"""What helps where adapters were merged with `keep_original=False`."""


class BaseWeight:
    """The weight and the bias of one base layer, and what belongs on them.

    Attributes:
        base_layer: the layer.
        shifts: what each adapter has folded, by its name.
        noise: what is put on the weight while adapters are on; None for nothing.
        original: this process's shards of the original weight and bias, on the CPU, while the layer holds others.
        lost: True where others were written and the originals not kept.
    """

    def __init__(self, base_layer: BaseLayer, shifts: nn.ModuleDict) -> None:
        self.base_layer, self.shifts = base_layer, shifts
        base_layer.read_pretrained = self.pretrained
        self.noise: Noise | None = None
        self.original: tuple[Tensor, Tensor | None] | None = None
        self.lost = False

    def check_rewritable(self, tied_to: Sequence[str], what: str) -> None:
        """Raise `AdapterStateError` unless `what` may be written into the weight: it is shared, or quantized."""
        if tied_to:
            raise AdapterStateError(
                f"the weight is shared with {', '.join(tied_to)}, which would change too; untie it first "
                "(untie=True), or leave the layer out."
            )
        if isinstance(self.base_layer, QuantizedBase):
            raise AdapterStateError(
                f"the weight is stored as {self.base_layer.format}, and {what} would have to be written into it. What "
                "has factors (LoRA and its like, without noise) is folded beside it, exactly."
            )

    # -- what adapters have folded -------------------------------------------------------------------------------------

    def folded(self, name: str) -> FoldedUpdate | None:
        """What the adapter has folded."""
        return cast(FoldedUpdate, self.shifts[name]) if name in self.shifts else None

    def replace_folded(self, name: str, folded: FoldedUpdate | None) -> None:
        """Put another update in its place, or none; `hold` writes the weight."""
        if name in self.shifts:
            del self.shifts[name]
        if folded is not None:
            self.shifts[name] = folded

    def with_factors(self, base: BaseLayer, name: str) -> BaseLayer:
        """`base` with what the adapter has folded as factors; what it has folded densely is in the weight."""
        if name not in self.shifts or isinstance(self.shifts[name], DenseUpdate):
            return base
        return StackedBase(base, self.shifts[name])

    @torch.no_grad()
    def fold(self, name: str, adapter: Adapter, blend: float, rule: Rule, keep_noise: bool) -> None:
        """Add an adapter's update to what it has folded; `hold` writes the weight.

        Args:
            name: of the adapter; `replace_folded` has given it something to fold into.
            adapter: stays as it is, and is to be reset next.
            blend: weight of the update, in (0, 1].
            rule: how earlier updates go on (module docstring of `adapters.folded`).
            keep_noise: whether the noise on the weight is folded too, which takes a dense update.

        Raises:
            AdapterStateError: the folded update is of a form that cannot hold the update or the noise; or the adapter
                changes the bias.
        """
        folded, wrapped = cast(FoldedUpdate, self.shifts[name]), self.with_factors(self.base_layer, name)
        try:
            fold(adapter, folded, wrapped, blend, rule, self.noise if keep_noise else None)
        except AdapterStateError as error:
            raise AdapterStateError(f'adapter "{name}": {error}') from error

    @torch.no_grad()
    def clean(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The original weight with everything the adapter has folded, without noise, (d_out, d_in).

        Summed in `dtype`, by default the one of adapters: a small update is rounded where it joins a large weight.
        """
        weight, folded = self.pretrained(dtype or self.base_layer.adapter_dtype), self.folded(name)
        return weight.clone() if folded is None else folded.merged_weight(weight)

    # -- reading the original ------------------------------------------------------------------------------------------

    def originals(self) -> dict[str, Tensor]:
        """Original weight and, where there is one, bias in their own layout; sharded where the layer is.

        Raises:
            AdapterStateError: they are lost.
        """
        if self.lost:
            raise AdapterStateError(
                f"merged with keep_original=False; the original weight is gone. {AFTER_FINAL_MERGE}"
            )
        stored, own_bias = self.base_layer.stored, self.base_layer.bias
        weight, bias = (stored, own_bias) if self.original is None else self.original
        if self.original is not None and isinstance(stored, DTensor):
            weight = as_shard_of(weight.to(stored.device), stored)
            if bias is not None and own_bias is not None:
                bias = as_shard_of(bias.to(stored.device), own_bias)
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    @torch.no_grad()
    def pretrained(self, dtype: torch.dtype) -> Tensor:
        """The original weight as (d_out, d_in), on the layer's device.

        Raises:
            AdapterStateError: it is lost.
        """
        original = self.originals()["weight"]
        if isinstance(self.base_layer, QuantizedBase):
            return self.base_layer.weight(dtype)
        return self.base_layer._read(full_tensor(original)).to(self.base_layer.device).to(dtype)

    # -- writing -------------------------------------------------------------------------------------------------------

    def keep(self) -> Tensor:
        """Keep the originals on the CPU from now on; this process's shard of the weight."""
        if self.original is None:
            bias = self.base_layer.bias
            kept_bias = None if bias is None else local(bias.detach()).to("cpu", copy=True)
            self.original = local(self.base_layer.stored.detach()).to("cpu", copy=True), kept_bias
        return self.original[0]

    @torch.no_grad()
    def hold(self, names: Iterable[str], noise: Noise | None, values: Tensor | None = None) -> None:
        """Write the original with what these adapters have folded densely, and noise; without either, the original.

        Args:
            names: adapters that are on.
            noise: what to draw.
            values: what `noise.values` gives, where it has been drawn ahead.
        """
        updates = self._dense_updates(names)
        if not (updates or noise or self.original is not None):
            return
        base = self.base_layer
        base.check_writable()
        stored = base.stored
        there = local(stored.detach()) if self.original is None else None  # the original, still on the device
        original = self.keep()
        if not updates and noise is None:
            local(stored).copy_(original)
            self.original = None
            return
        # sent as it is stored and cast there, in half as many bytes
        weight = base._read(original if there is None else there).to(base.device)
        weight = weight.to(base.adapter_dtype, copy=True)
        for update in updates:
            weight += local(update.delta)
        if noise is not None:
            weight += noise.draw(base._read(stored), weight.dtype, values)
        local(stored).copy_(base._store(weight))

    @torch.no_grad()
    def write_merged(self, weight: Tensor, bias: Tensor | None, keep_original: bool) -> None:
        """Write a full weight (d_out, d_in) and bias, rounded once."""
        if keep_original:
            self.keep()
        else:
            self.original, self.lost = None, True
        self.base_layer.write(weight)
        self._write_bias(bias)

    @torch.no_grad()
    def restore_bias(self) -> None:
        """Write the original bias."""
        if self.original is None:
            return
        own, bias = self.base_layer.bias, self.original[1]
        if isinstance(own, DTensor) and bias is not None:
            local(own).copy_(bias)
        else:
            self._write_bias(bias)

    def _write_bias(self, bias: Tensor | None) -> None:
        module, own = self.base_layer.module, self.base_layer.bias
        if bias is None:
            if own is not None:
                setattr(module, "bias", None)  # noqa: B010 - Module.__setattr__ is typed for modules and tensors only
        elif own is None:
            value = bias.detach().to(self.base_layer.dtype, copy=True)
            module.bias = nn.Parameter(value, requires_grad=False)
        else:
            put(own, bias)

    def follow_sharding(self) -> None:
        """Lay out the originals and dense updates as the weight has just been cut up."""
        stored, bias = self.base_layer.stored, self.base_layer.bias
        if not isinstance(stored, DTensor):
            return
        self.base_layer.sharded = stored
        if self.original is not None:
            kept, kept_bias = self.original
            own_bias = kept_bias if kept_bias is None or bias is None else own_rows(kept_bias, bias).clone()
            self.original = own_rows(kept, stored).clone(), own_bias
        for update in self._dense_updates(self.shifts):
            for name, buffer in update.named_buffers():
                setattr(update, name, shard_like(buffer, self.base_layer._read(stored.detach())))

    def _dense_updates(self, names: Iterable[str]) -> list[DenseUpdate]:
        found = []
        for name in names:
            update = self.folded(name)
            if isinstance(update, DenseUpdate):
                found.append(update)
        return found
