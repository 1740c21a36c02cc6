"""AdaptedLayer: one layer with its named adapters, and the only keeper of which are active and trainable.

What the base weight holds is kept by its `base_weight`, and what is merged into it by its `merging`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.base_weight import BaseWeight
from lora_lightning.adapters.folded import DenseUpdate, FoldedUpdate, Rule, factors_with, fits, update_like
from lora_lightning.adapters.foreign_saving import check_foreign_saving
from lora_lightning.adapters.layer_state import keep_originals_in_state
from lora_lightning.adapters.layers.base import BaseLayer, StackedBase
from lora_lightning.adapters.merge_weight import Applied, Merging
from lora_lightning.adapters.noise import Noise
from lora_lightning.adapters.weight_placeholder import weight_placeholder
from lora_lightning.distributed import assembled
from lora_lightning.errors import AdapterStateError, did_you_mean


class AdaptedLayer(nn.Module):
    """Stands in the place of a layer. Tensors lie at `base.*`, `adapters.<name>.*` and, once folded, `shifts.<name>.*`.

    Attributes:
        base: the module that is called: the layer itself, or a plain one while a quantized layer is merged.
        adapters: by name.
        shifts: what each adapter has folded, by its name; the word is that of the tensors' names.
        base_weight: what the weight holds: the original, dense folded updates, noise.
        merging: what is merged into it, and the way back.
        tied_to: paths of other modules that use the base weight, which a merge would change as well.
        renames_weights: the layer's own weights have other names than without it.
    """

    renames_weights = True

    def __init__(self, base_layer: BaseLayer) -> None:
        super().__init__()
        check_foreign_saving()
        self.base = base_layer.module
        self.adapters = nn.ModuleDict()
        self.shifts = nn.ModuleDict()
        # plain objects, so that what they hold is registered once, above
        self.base_weight = BaseWeight(base_layer, self.shifts)
        self.merging = Merging(self.base_weight)
        self._active: tuple[str, ...] = ()
        self._disabled = False
        self.tied_to: tuple[str, ...] = ()
        keep_originals_in_state(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        check_foreign_saving()  # in the process of whoever reads a pickle

    @property
    def base_layer(self) -> BaseLayer:
        """The layer as methods see it, whatever is merged or folded."""
        return self.base_weight.base_layer

    # -- which adapters are on -----------------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[str, ...]:
        """Names whose update is applied, in order."""
        return self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self._active = names
        self.rewrite()

    @property
    def disabled(self) -> bool:
        """True inside `disable_adapters`."""
        return self._disabled

    @disabled.setter
    def disabled(self, disabled: bool) -> None:
        self._disabled = disabled
        self.rewrite()

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
            raise AdapterStateError(f'adapter "{name}" is merged; {self.merging.way_out}')
        del self.adapters[name]
        if name in self.shifts:
            del self.shifts[name]
        if not self.adapters:
            self.base_weight.noise = None
        self.active = tuple(n for n in self.active if n != name)

    def check_active(self, names: tuple[str, ...]) -> None:
        """Raise `AdapterStateError` unless `names` exist here and can be applied together."""
        adapters = [self.adapter(name) for name in names]
        if len(set(names)) < len(names):
            raise AdapterStateError(f"{', '.join(names)} names an adapter twice; its update would be applied twice.")
        if len(adapters) < 2 or all(adapter.additive for adapter in adapters):
            return
        if not all(adapter.stacks for adapter in adapters) or any(name in self.shifts for name in names):
            kinds = ", ".join(f"{name} ({type(a).__name__})" for name, a in zip(names, adapters, strict=True))
            raise AdapterStateError(
                f"{kinds} cannot be active together: only additive updates sum on one layer. Activate one of them."
            )

    def forward(self, x: Tensor) -> Tensor:
        """The base layer with the active adapters applied."""
        names = self._applied()
        if not names:
            return cast(Tensor, self.base(x))
        last = names[-1]
        base = self.base_weight.with_factors(self._base_under(names[:-1]), last)
        # entered through `Module.__call__`, which sharding hooks rely on
        return cast(Tensor, self.adapters[last](x, base))

    def _applied(self) -> tuple[str, ...]:
        return () if self._disabled or self.merging.names else self._active

    def _base_under(self, names: Iterable[str]) -> BaseLayer:
        """The layer that is called, with adapters on it."""
        base = self.merging.stand_in or self.base_weight.base_layer
        for name in names:
            base = StackedBase(self.base_weight.with_factors(base, name), self.adapters[name])
        return base

    # -- the effective layer, for code that reads a weight instead of calling the layer --------------------------------

    @property
    def weight(self) -> Tensor:
        """The weight that this layer applies now, in the base layer's own layout and dtype.

        An owner that reads it instead of calling the layer (nn.MultiheadAttention) computes the adapted function too,
        without the adapter's dropout. Where an active adapter depends on its input, it answers dtype, device and shape
        only, and raises `AdapterStateError` when it is computed with.
        """
        names = self._applied()
        if not names:
            return cast(Tensor, self.base.weight)
        for name in names:
            if not self.adapter(name).mergeable:
                return weight_placeholder(self.base_layer, f'adapter "{name}" depends on its input')
        dtype = self.base_layer.adapter_dtype
        return self.base_layer._store(self._base_under(names).weight(dtype)).to(self.base_layer.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias that this layer applies now, in the base layer's dtype."""
        bias = self._base_under(self._applied()).bias
        return bias if bias is None or bias is self.base_layer.bias else bias.to(self.base_layer.dtype)

    @torch.no_grad()
    def applied_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight of this layer now, (d_out, d_in): what adapters have folded and learned is in it, noise is not."""
        names = self._applied()
        if self.base_weight.noise is None or not names:
            with assembled(self.adapters):
                return self._base_under(names).weight(dtype).detach()
        return self.merging.merged(self._parts(names))[0].to(dtype)

    @property
    def requires_grad(self) -> bool:
        """Whether anything here trains, for owners that take the layer for its weight."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def __repr__(self) -> str:
        """One line: the base layer, and each adapter with its state."""
        marks = ((self.active, "active"), (self.merged, "merged"), (tuple(self.shifts), "folded"))
        parts = []
        for name, adapter in self.adapters.items():
            states = [state for names, state in marks if name in names]
            if not any(p.requires_grad for p in adapter.parameters()):
                states.append("frozen")
            options = ", ".join([adapter.extra_repr()] * bool(adapter.extra_repr()) + states)
            parts.append(f"{name}={type(adapter).__name__}({options})")
        return f"AdaptedLayer({' '.join(repr(self.base).split())}, {', '.join(parts)})"

    def __getattr__(self, name: str) -> Any:
        """Sizes and options of the base layer (`in_features`, `kernel_size`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.base, name)

    # -- one adapter with what it has folded ---------------------------------------------------------------------------

    def folded(self, name: str) -> FoldedUpdate | None:
        """What the adapter has given away at the ends of its stages."""
        return self.base_weight.folded(name)

    def wrapped(self, name: str) -> BaseLayer:
        """The base that the adapter sees: the layer with what it has folded."""
        return self.base_weight.with_factors(self.base_layer, name)

    def clean_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The pretrained weight with everything the adapter has folded; see `BaseWeight.clean`."""
        return self.base_weight.clean(name, dtype)

    @torch.no_grad()
    def merged_weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The pretrained weight with everything one adapter has folded and learned, (d_out, d_in)."""
        weight = self.clean_weight(name, dtype)
        with assembled(self.adapter(name)):
            return self.adapter(name).merged_weight(weight)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(A (R, d_in), B (d_out, R)) of the adapter and what it has folded; None where there is no such form."""
        with assembled(self.adapter(name)):
            own = self.adapter(name).low_rank()
        return factors_with(own, self.folded(name))

    def set_folded(self, name: str, folded: FoldedUpdate | None) -> None:
        """Give the adapter another folded update, or none.

        Raises:
            AdapterStateError: the layer is merged; or a dense one on a weight that another module shares, or that is
                quantized.
        """
        self.merging.check_unmerged()
        if isinstance(folded, DenseUpdate):
            self.base_weight.check_rewritable(self.tied_to, "an update that has no factors")
        self.base_weight.replace_folded(name, folded)
        self.rewrite()

    def make_room(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give the adapter an empty folded update that `tensors`, by name, fit into, or none where there are none.

        Raises:
            AdapterStateError: they fit none of this layer.
        """
        empty = update_like(self.base_layer, tensors) if tensors else None
        if tensors and empty is None:
            raise AdapterStateError(f'adapter "{name}": what was folded has other shapes than this layer.')
        if not fits(self.folded(name), tensors):
            self.set_folded(name, empty)

    def fold(self, name: str, blend: float = 1.0, rule: Rule = "outer_step", keep_noise: bool = False) -> None:
        """Add the adapter's update to what it has folded; the adapter itself stays as it is, and is to be reset next.

        See `BaseWeight.fold`.

        Raises:
            AdapterStateError: the layer is merged, or the update or the noise cannot be folded.
        """
        self.merging.check_unmerged()
        self.base_weight.fold(name, self.adapter(name), blend, rule, keep_noise)
        if isinstance(self.folded(name), DenseUpdate):  # factors are no part of the weight
            self.rewrite()

    # -- what the base weight holds ------------------------------------------------------------------------------------

    @property
    def rewritten(self) -> bool:
        """Whether the layer holds another weight than the original, which is kept on the CPU."""
        return self.base_weight.original is not None

    def rewrite(self, values: Tensor | None = None) -> None:
        """Write the base weight as it must be now; `values` are the noise's, where they have been drawn already."""
        if self.merged:
            return
        if self._disabled:
            self.base_weight.hold((), None)
        else:
            self.base_weight.hold(self._active, self.base_weight.noise, values)

    def set_noise(self, noise: Noise | None, values: Tensor | None = None) -> None:
        """Put noise on the weight, or take it off; `values` are its numbers, where they have been drawn ahead.

        Raises:
            AdapterStateError: the layer is merged, another module shares the weight, or it is quantized; or an active
                adapter reads which weights are zero.
        """
        if noise is not None:
            self.merging.check_unmerged()
            self.base_weight.check_rewritable(self.tied_to, "noise")
            self._check_zeros()
        self.base_weight.noise = noise
        self.rewrite(values)

    def _check_zeros(self) -> None:
        for name in self._active:
            adapter = self.adapter(name)
            if adapter.keeps_zeros:
                raise AdapterStateError(
                    f'adapter "{name}" ({type(adapter).__name__}) keeps the zeros of the weight, which noise would '
                    "fill; train it without noise (noise=0)."
                )

    def follow_sharding(self) -> None:
        """Lay out what goes with the weight as the weight has just been cut up: originals and dense updates."""
        self.base_weight.follow_sharding()

    def originals(self) -> dict[str, Tensor]:
        """Weight and, where there is one, bias as before any merge or fold; see `BaseWeight.originals`."""
        return self.base_weight.originals()

    def original_weight(self) -> Tensor:
        """The base weight in its own layout, as it was before any merge or fold."""
        return self.base_weight.originals()["weight"]

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """The base weight as (d_out, d_in), as it was before any merge or fold; see `BaseWeight.pretrained`."""
        return self.base_weight.pretrained(dtype)

    # -- merging -------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> tuple[str, ...]:
        """Names whose update is inside the base weight now."""
        return self.merging.names

    @property
    def can_unmerge(self) -> bool:
        """Whether the base weight is the original, or can be restored."""
        return not self.base_weight.lost

    def _parts(self, names: Iterable[str]) -> Applied:
        return {name: (self.adapter(name), self.folded(name)) for name in names}

    def check_mergeable(self) -> None:
        """Raise `AdapterStateError` if the active adapters cannot be merged: routed, not finite, or too large."""
        self.merging.check(self._parts(self.active))

    @torch.no_grad()
    def merge(self, keep_original: bool = True) -> None:
        """Write the active adapters into the base weight, rounded once; noise is not among them.

        A quantized layer stays as it is, and a plain one with the sum stands in its place. Call `check_mergeable`
        first.
        """
        if self.active and not self.merged:
            self.base = self.merging.merge(self._parts(self.active), keep_original)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit, dense updates and noise on it as before.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        if self.merged:
            self.base = self.merging.unmerge()
            self.rewrite()
