"""AdaptedLayer: one layer with its named adapters, and the only keeper of which are active, trainable and merged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate, Shift, update_like
from lora_lightning.adapters.folding_rules import Rule
from lora_lightning.adapters.layers.base import BaseLayer, StackedBase
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.adapters.noise import Noise
from lora_lightning.adapters.weight_placeholder import weight_placeholder
from lora_lightning.distributed import all_finite, as_shard_of, assembled, full_tensor, local, own_rows, put, shard_like
from lora_lightning.errors import AdapterStateError, SettingsError, did_you_mean


class AdaptedLayer(nn.Module):
    """Stands in the place of a layer. Tensors lie at `base.*`, `adapters.<name>.*` and, once folded, `shifts.<name>.*`.

    Attributes:
        merged: names whose update is inside the base weight now.
        tied_to: paths of other modules that use the base weight, which a merge would change as well.
    """

    def __init__(self, base_layer: BaseLayer) -> None:
        super().__init__()
        self.base = base_layer.module
        self.adapters = nn.ModuleDict()
        self.shifts = nn.ModuleDict()
        self.base_layer = base_layer
        base_layer.read_pretrained = self.pretrained_weight
        self._active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self._disabled = False
        self.tied_to: tuple[str, ...] = ()
        # this process's shards of weight and bias, on the CPU, while the layer holds others
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._noise: Noise | None = None
        self._stand_in: BaseLayer | None = None  # of the plain layer in the place of a quantized one, while merged
        self.register_state_dict_post_hook(_emit_originals)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_expect_originals)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_write_after_loading)  # type: ignore[no-untyped-call]

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

    def forward(self, x: Tensor) -> Tensor:
        """The base layer with the active adapters applied."""
        names = self._applied()
        if not names:
            return cast(Tensor, self.base(x))
        # entered through `Module.__call__`, which sharding hooks rely on
        return cast(Tensor, self.adapters[names[-1]](x, self._with_folded(self._base_under(names[:-1]), names[-1])))

    def _applied(self) -> tuple[str, ...]:
        return () if self._disabled or self.merged else self._active

    def _base_under(self, names: Iterable[str]) -> BaseLayer:
        base = self._stand_in or self.base_layer
        for name in names:
            base = StackedBase(self._with_folded(base, name), self.adapters[name])
        return base

    def _with_folded(self, base: BaseLayer, name: str) -> BaseLayer:
        """`base` with what the adapter has folded as factors; what it has folded densely is in the weight."""
        if name not in self.shifts or isinstance(self.shifts[name], DenseUpdate):
            return base
        return StackedBase(base, self.shifts[name])

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
        if name in self.shifts:
            del self.shifts[name]
        if not self.adapters:
            self._noise = None
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

    @torch.no_grad()
    def applied_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight of this layer now, (d_out, d_in): what adapters have folded and learned is in it, noise is not."""
        names = self._applied()
        if self._noise is None or not names:
            with assembled(self.adapters):
                return self._base_under(names).weight(dtype).detach()
        return self._merged()[0].to(dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias that this layer applies now, in the base layer's dtype."""
        bias = self._base_under(self._applied()).bias
        return bias if bias is None or bias is self.base_layer.bias else bias.to(self.base_layer.dtype)

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
        if own is None or name not in self.shifts:
            return own
        shift = self.shifts[name]
        if not isinstance(shift, FactoredUpdate):
            return None
        A, B = shift.low_rank()
        if not own[1].any():  # a stage that has just begun
            return A, B
        return torch.cat([A, own[0]], dim=-2), torch.cat([B, own[1]], dim=-1)

    # -- folding: what an adapter gives away at the end of a stage -----------------------------------------------------

    @property
    def rewritten(self) -> bool:
        """Whether the layer holds another weight than the original, which is kept on the CPU."""
        return self._kept is not None

    def wrapped(self, name: str) -> BaseLayer:
        """The base that the adapter sees: the layer with what it has folded."""
        return self._with_folded(self.base_layer, name)

    def set_folded(self, name: str, shift: Shift | None) -> None:
        """Give the adapter another shift, or none.

        Raises:
            AdapterStateError: the layer is merged; or a dense one on a weight that another module shares, or that is
                quantized.
        """
        self._check_unmerged()
        if isinstance(shift, DenseUpdate):
            self._check_own_weight()
            self._check_written("an update that has no factors")
        if name in self.shifts:
            del self.shifts[name]
        if shift is not None:
            self.shifts[name] = shift
        self.rewrite()

    def make_room(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give the adapter an empty shift that `tensors`, by name, fit into, or none where there are none.

        Raises:
            AdapterStateError: they fit no shift of this layer.
        """
        shift = update_like(self.base_layer, tensors) if tensors else None
        if tensors and shift is None:
            raise AdapterStateError(f'adapter "{name}": what was folded has other shapes than this layer.')
        present = self.shifts[name].state_dict() if name in self.shifts else {}
        if {k: t.shape for k, t in present.items()} != {k: t.shape for k, t in tensors.items()}:
            self.set_folded(name, shift)

    def set_noise(self, noise: Noise | None, values: Tensor | None = None) -> None:
        """Put noise on the weight, or take it off; without any, and without a dense shift, the original is back.

        Args:
            noise: what to put on.
            values: what `noise.values` gives, where it has been drawn ahead.

        Raises:
            AdapterStateError: the layer is merged, another module shares the weight, or it is quantized.
        """
        if noise is not None:
            self._check_unmerged()
            self._check_own_weight()
            self._check_written("noise")
        self._noise = noise
        self.rewrite(values)

    @torch.no_grad()
    def fold(self, name: str, share: float = 1.0, rule: Rule = "outer_step", keep_noise: bool = False) -> None:
        """Add the adapter's update to its shift; the adapter itself stays as it is, and is to be reset next.

        Args:
            name: which adapter; `set_folded` has given it a shift.
            share: weight of the update, in (0, 1].
            rule: how shares of earlier updates go on (module docstring of `adapters.shift`).
            keep_noise: whether the noise on the weight becomes part of the shift, which must be dense then.

        Raises:
            AdapterStateError: the layer is merged, or the shift is of a form that cannot hold the update or the noise;
                the adapter changes the bias.
        """
        self._check_unmerged()
        adapter, shift = self.adapter(name), cast("Shift", self.shifts[name])
        bias = self.base_layer.bias
        with assembled(adapter):
            moved = adapter.merged_bias(bias)
            if bias is not None and moved is not bias and not torch.equal(cast(Tensor, moved).to(bias.dtype), bias):
                raise AdapterStateError(
                    f'adapter "{name}": {type(adapter).__name__} moves the bias, which no shift holds.'
                )
            factors = adapter.low_rank()
            if isinstance(shift, FactoredUpdate):
                if factors is None or (keep_noise and self._noise is not None):
                    what = "noise" if factors else f"the update of {type(adapter).__name__}"
                    raise AdapterStateError(f'adapter "{name}": {what} has no factors to fold; give it a DenseUpdate.')
                shift.fold(*factors, share, rule)
                return
            if factors is None:
                weight = self.wrapped(name).weight(self.base_layer.adapter_dtype)
                update = adapter.merged_weight(weight) - weight
            else:  # the difference of two weights would have lost digits of a small update
                update = factors[1] @ factors[0]
        shift.fold(update, share, rule)
        if keep_noise and self._noise is not None:
            local(shift.delta).add_(self._noise.draw(shift.delta))
        self.rewrite()

    @torch.no_grad()
    def clean_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The pretrained weight with everything the adapter has folded, without noise, (d_out, d_in).

        Summed in `dtype`, by default the one of adapters: a small update is rounded where it joins a large weight.
        """
        weight = self.pretrained_weight(dtype or self.base_layer.adapter_dtype)
        return cast("Shift", self.shifts[name]).merged_weight(weight) if name in self.shifts else weight.clone()

    @torch.no_grad()
    def rewrite(self, values: Tensor | None = None) -> None:
        """Write the weight as it must be now: the original, dense shifts of applied adapters, noise; rounded once.

        `values` are the noise's, where they have been drawn already.
        """
        names = () if self._disabled else self._active
        dense = [shift for name in names if name in self.shifts and isinstance(shift := self.shifts[name], DenseUpdate)]
        noise = None if self._disabled else self._noise
        if self.merged or not (dense or noise or self.rewritten):
            return
        self.base_layer.check_writable()
        stored = self.base_layer.stored
        there = None if self.rewritten else local(stored.detach())  # the original, where it has not left the device
        original = self._keep()
        if not dense and noise is None:
            local(stored).copy_(original)
            self._kept = None
            return
        # sent as it is stored and cast there, in half as many bytes
        weight = self.base_layer._read(original if there is None else there).to(self.base_layer.device)
        weight = weight.to(self.base_layer.adapter_dtype, copy=True)
        for shift in dense:
            weight += local(shift.delta)
        if noise is not None:
            weight += noise.draw(self.base_layer._read(stored), weight.dtype, values)
        local(stored).copy_(self.base_layer._store(weight))

    def _keep(self) -> Tensor:
        """This process's shard of the original weight, kept on the CPU with its bias from now on."""
        if self._kept is None:
            bias = self.base_layer.bias
            kept_bias = None if bias is None else local(bias.detach()).to("cpu", copy=True)
            self._kept = (local(self.base_layer.stored.detach()).to("cpu", copy=True), kept_bias)
        return self._kept[0]

    def follow_sharding(self) -> None:
        """Lay out what goes with the weight as the weight has just been cut up: originals and dense updates."""
        stored, bias = self.base_layer.stored, self.base_layer.bias
        if not isinstance(stored, DTensor):
            return
        self.base_layer.sharded = stored
        if self._kept is not None:
            kept, kept_bias = self._kept
            own_bias = kept_bias if kept_bias is None or bias is None else own_rows(kept_bias, bias).clone()
            self._kept = (own_rows(kept, stored).clone(), own_bias)
        for shift in self.shifts.values():
            if isinstance(shift, DenseUpdate):
                for name, buffer in shift.named_buffers():
                    setattr(shift, name, shard_like(buffer, self.base_layer._read(stored.detach())))

    def _check_unmerged(self) -> None:
        if self.merged:
            raise AdapterStateError(f"{', '.join(self.merged)} is merged; call unmerge first.")

    def _check_own_weight(self) -> None:
        if self.tied_to:
            raise AdapterStateError(
                f"the weight is shared with {', '.join(self.tied_to)}, which would change too; untie it first, or "
                "leave the layer out."
            )

    def _check_written(self, what: str) -> None:
        if isinstance(self.base_layer, QuantizedBase):
            raise AdapterStateError(
                f"the weight is stored as {self.base_layer.format}, and {what} would have to be written into it. What "
                "has factors (LoRA and its like, without noise) is folded beside it, exactly."
            )

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
                if not all_finite(tensor):
                    raise AdapterStateError(f'adapter "{name}": {tensor_name} holds values that are not finite.')
        if self.active and not self.merged:
            weight, bias = self._merged()
            if bias is not None and self.base_layer.bias is None and isinstance(self.base_layer.stored, DTensor):
                raise AdapterStateError(
                    "the layer has no bias and is sharded, so that it cannot be given the adapter's; save the "
                    "adapter, and merge it into a model that is not sharded."
                )
            for merged in (weight, bias):
                if merged is not None and not torch.isfinite(merged.to(self.base_layer.dtype)).all():
                    raise AdapterStateError(f"the merged weight overflows {self.base_layer.dtype}.")

    @torch.no_grad()
    def _merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out, d_in) and bias with the active adapters and without noise, in float32 at least."""
        kept, weight = self.originals(), self.pretrained_weight(self.base_layer.adapter_dtype)
        bias = full_tensor(kept["bias"]).to(self.base_layer.device) if "bias" in kept else None
        for name in self.active:
            if name in self.shifts:
                weight = cast("Shift", self.shifts[name]).merged_weight(weight)
            with assembled(self.adapter(name)):
                weight, bias = self.adapter(name).merged_weight(weight), self.adapter(name).merged_bias(bias)
        return weight, bias

    @torch.no_grad()
    def merge(self, keep_original: bool = True) -> None:
        """Write the active adapters' update into the base weight, rounded once; does nothing where it is merged.

        A quantized layer stays as it is, and a plain one with the sum stands in its place. Call `check_mergeable`
        first.
        """
        if self.merged or not self.active:
            return
        self.base_layer.check_writable()
        weight, bias = self._merged()
        if isinstance(self.base_layer, QuantizedBase):
            self.base = self.base_layer.plain(weight, bias)
            plain = cast(BaseLayer, core_base_layer(self.base))
            if keep_original:
                self._stand_in = plain
            else:
                self.base_layer = plain
            self.merged = self.active
            return
        self._keep()
        if not keep_original:
            self._kept = None
        self.base_layer.write(weight)
        self._write_bias(bias)
        self.merged = self.active

    def unmerge(self) -> None:
        """Restore the base weight bit for bit, dense shifts and noise on it as before.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        if not self.merged:
            return
        if self._stand_in is not None:
            self.base, self._stand_in, self.merged = self.base_layer.module, None, ()
            return
        if self._kept is None:
            raise AdapterStateError("merged with keep_original=False; the original weight is gone.")
        self.base_layer.check_writable()
        with torch.no_grad():
            own, bias = self.base_layer.bias, self._kept[1]
            if isinstance(own, DTensor) and bias is not None:
                local(own).copy_(bias)
            else:
                self._write_bias(bias)
        self.merged = ()
        self.rewrite()

    def _write_bias(self, bias: Tensor | None) -> None:
        own = self.base_layer.bias
        if bias is None:
            if own is not None:
                setattr(self.base, "bias", None)  # noqa: B010 - Module.__setattr__ is typed for modules and tensors only
        elif own is None:
            value = bias.detach().to(self.base_layer.dtype, copy=True)
            self.base.bias = nn.Parameter(value, requires_grad=False)
        else:
            put(own, bias)

    def originals(self) -> dict[str, Tensor]:
        """Weight and, where there is one, bias of the base layer in their own layout, as before any merge or fold.

        Where the layer is sharded, so do they.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        if not self.can_unmerge:
            raise AdapterStateError("merged with keep_original=False; the original weight is gone.")
        now: tuple[Tensor, Tensor | None] = self.base_layer.stored, self.base_layer.bias
        weight, bias = now if self._kept is None else self._kept
        if self._kept is not None and isinstance(now[0], DTensor):
            weight = as_shard_of(weight.to(now[0].device), now[0])
            bias = bias if bias is None or now[1] is None else as_shard_of(bias.to(now[0].device), now[1])
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    @torch.no_grad()
    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """The base weight as (d_out, d_in), as it was before any merge or fold, where the layer is.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        original = self.originals()["weight"]
        if isinstance(self.base_layer, QuantizedBase):
            return self.base_layer.weight(dtype)
        return self.base_layer._read(full_tensor(original)).to(self.base_layer.device).to(dtype)

    def original_weight(self) -> Tensor:
        """The base weight in its own layout, as it was before any merge or fold.

        Raises:
            AdapterStateError: it was merged with `keep_original=False`.
        """
        return self.originals()["weight"]

    @property
    def can_unmerge(self) -> bool:
        """Whether the base weight is the original, or can be restored."""
        return not self.merged or self._kept is not None or self._stand_in is not None


# -- state dictionaries hold the original weight, whatever the layer holds now -----------------------------------------


def _emit_originals(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    layer = cast(AdaptedLayer, module)
    if layer._stand_in is not None:
        for key in [key for key in state if key.startswith(f"{prefix}base.")]:
            del state[key]
        layer.base_layer.module.state_dict(destination=state, prefix=f"{prefix}base.")
    elif layer._kept is not None:
        state.pop(f"{prefix}base.bias", None)
        state.update({f"{prefix}base.{name}": tensor for name, tensor in layer.originals().items()})


def _expect_originals(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Make room for what `state` holds: shifts of its shapes, and a weight that is an original."""
    layer = cast(AdaptedLayer, module)
    own = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    if own:
        layer._check_unmerged()
    for name in layer.adapters:
        if any(key.startswith(f"adapters.{name}.") for key in own):
            inside = f"shifts.{name}."
            tensors = {key.removeprefix(inside): state[prefix + key] for key in own if key.startswith(inside)}
            layer.make_room(name, tensors)
    if "base.weight" in own:
        layer._kept = None


def _write_after_loading(module: nn.Module, _keys: object) -> None:
    cast(AdaptedLayer, module).rewrite()


def check_name(name: str) -> None:
    """Raise `SettingsError` unless `name` can be a module name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise SettingsError(
            f'adapter name is "{name}"; it must be letters, digits, "_" or "-", and none of the words '
            'a module dictionary owns, such as "keys" or "type".'
        )
