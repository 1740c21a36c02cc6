"""AdaptedLayer: one layer with its named adapters, and the only keeper of which are active, trainable and merged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weights import BaseLayer, StackedBase
from lora_lightning.errors import AdapterStateError, SettingsError, did_you_mean


class AdaptedLayer(nn.Module):
    """Stands in the place of a layer. Parameters lie at `base.*` and `adapters.<name>.*`.

    Attributes:
        active: names whose update is applied, in order.
        merged: names whose update is inside the base weight now.
        disabled: True inside `disable_adapters`.
        tied_to: paths of other modules that use the base weight, which a merge would change as well.
    """

    def __init__(self, accessor: BaseLayer) -> None:
        super().__init__()
        self.base = accessor.module
        self.adapters = nn.ModuleDict()
        self.accessor = accessor
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.disabled = False
        self.tied_to: tuple[str, ...] = ()
        self._original: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The base layer with the active adapters applied."""
        names = self._applied()
        if not names:
            return cast(Tensor, self.base(x))
        # entered through `Module.__call__`, which sharding hooks rely on
        return cast(Tensor, self.adapters[names[-1]](x, self._base_under(names[:-1])))

    def _applied(self) -> tuple[str, ...]:
        return () if self.disabled or self.merged else self.active

    def _base_under(self, names: Iterable[str]) -> BaseLayer:
        base = self.accessor
        for name in names:
            base = StackedBase(base, self.adapters[name])
        return base

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            AdapterStateError: there is none, with the nearest.
        """
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise AdapterStateError(f'no adapter "{name}".{did_you_mean(name, self.adapters)} Installed: {have}.')
        return cast(Adapter, self.adapters[name])

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter on the layer and make it the active one."""
        self.adapters[name] = adapter
        self.active = (name,)

    def remove(self, name: str) -> None:
        """Take an adapter off the layer.

        Raises:
            AdapterStateError: its update is merged into the base weight.
        """
        self.adapter(name)
        if name in self.merged:
            raise AdapterStateError(f'adapter "{name}" is merged; call unmerge before it is removed.')
        del self.adapters[name]
        self.active = tuple(n for n in self.active if n != name)

    def check_active(self, names: tuple[str, ...]) -> None:
        """Raise `AdapterStateError` unless `names` exist here and can be applied together."""
        adapters = [self.adapter(name) for name in names]
        if len(set(names)) < len(names):
            raise AdapterStateError(f"{', '.join(names)} names an adapter twice; its update would be applied twice.")
        if len(adapters) > 1 and not all(adapter.additive for adapter in adapters):
            kinds = ", ".join(f"{name} ({type(a).__name__})" for name, a in zip(names, adapters, strict=True))
            raise AdapterStateError(f"{kinds} cannot be active together: only additive updates sum on one layer.")

    # -- the effective layer, for code that reads a weight instead of calling the layer --------------------------------

    @property
    def weight(self) -> Tensor:
        """The weight that this layer applies now, in the base layer's own layout and dtype.

        An owner that reads it instead of calling the layer (nn.MultiheadAttention) computes the adapted function too,
        without the adapter's dropout.

        Raises:
            AdapterStateError: an active adapter depends on its input.
        """
        names = self._applied()
        if not names:
            return cast(Tensor, self.base.weight)
        for name in names:
            if not self.adapter(name).mergeable:
                raise AdapterStateError(f'adapter "{name}" depends on its input, so no single weight states it.')
        dtype = self.accessor.adapter_dtype
        return self.accessor._store(self._base_under(names).weight(dtype)).to(self.accessor.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias that this layer applies now, in the base layer's dtype."""
        bias = self._base_under(self._applied()).bias
        return bias if bias is None or bias is self.accessor.bias else bias.to(self.accessor.dtype)

    def __getattr__(self, name: str) -> Any:
        """Sizes and options of the base layer (`in_features`, `kernel_size`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.base, name)

    # -- merging -------------------------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        """Raise `AdapterStateError` if the active adapters cannot be merged: routed, not finite, or too large."""
        if self.merged and self.merged != self.active:
            raise AdapterStateError(f"{', '.join(self.merged)} is merged already; call unmerge first.")
        for name in self.active:
            adapter = self.adapter(name)
            if not adapter.mergeable:
                raise AdapterStateError(f'adapter "{name}" ({type(adapter).__name__}) depends on its input; no merge.')
            for tensor_name, tensor in adapter.named_parameters():
                if not torch.isfinite(tensor).all():
                    raise AdapterStateError(f'adapter "{name}": {tensor_name} holds values that are not finite.')
        if self.active and not self.merged:
            for merged in self._merged():
                if merged is not None and not torch.isfinite(merged.to(self.accessor.dtype)).all():
                    raise AdapterStateError(f"the merged weight overflows {self.accessor.dtype}.")

    @torch.no_grad()
    def _merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out, d_in) and bias with the active adapters, in float32 at least."""
        under = self._base_under(self.active)
        return under.weight(self.accessor.adapter_dtype), under.bias

    @torch.no_grad()
    def merge(self, keep_original: bool = True) -> None:
        """Write the active adapters' update into the base weight, rounded once; does nothing where it is merged.

        Call `check_mergeable` first.
        """
        if self.merged or not self.active:
            return
        weight, bias = self._merged()
        if keep_original:
            own_bias = self.accessor.bias
            kept_bias = None if own_bias is None else own_bias.detach().to("cpu", copy=True)
            self._original = (self.accessor.stored.detach().to("cpu", copy=True), kept_bias)
        self.accessor.write(weight)
        self._write_bias(bias)
        self.merged = self.active

    def unmerge(self) -> None:
        """Restore the base weight bit for bit.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        if not self.merged:
            return
        if self._original is None:
            raise AdapterStateError("merged with keep_original=False; the original weight is gone.")
        weight, bias = self._original
        with torch.no_grad():
            self.accessor.stored.copy_(weight)
            self._write_bias(bias)
        self.merged, self._original = (), None

    def _write_bias(self, bias: Tensor | None) -> None:
        own = self.accessor.bias
        if bias is None:
            if own is not None:
                setattr(self.base, "bias", None)  # noqa: B010 - Module.__setattr__ is typed for modules and tensors only
        elif own is None:
            value = bias.detach().to(self.accessor.dtype, copy=True)
            self.base.bias = nn.Parameter(value, requires_grad=False)
        else:
            own.copy_(bias)

    def originals(self) -> dict[str, Tensor]:
        """Weight and, where there is one, bias of the base layer in their own layout, as before any merge.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        if not self.can_unmerge:
            raise AdapterStateError("merged with keep_original=False; the original weight is gone.")
        now: tuple[Tensor, Tensor | None] = self.accessor.stored, self.accessor.bias
        weight, bias = now if self._original is None else self._original
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def original_weight(self) -> Tensor:
        """The base weight in its own layout, as it was before any merge.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        return self.originals()["weight"]

    @property
    def can_unmerge(self) -> bool:
        """Whether the base weight is the original, or can be restored."""
        return not self.merged or self._original is not None


def check_name(name: str) -> None:
    """Raise `SettingsError` unless `name` can be a module name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise SettingsError(
            f'adapter name is "{name}"; it must be letters, digits, "_" or "-", and none of the words '
            'a module dictionary owns, such as "keys" or "type".'
        )
