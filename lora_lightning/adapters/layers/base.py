"""BaseLayer: the one way to call a frozen layer and to read or write its weight, whatever stores it.

    kind        stored as                 read as (d_out, d_in)
    linear      (out, in)                 (out, in)
    linear      Conv1D of transformers    (out, in): the stored (in, out), transposed
    conv        (out, in/groups, *k)      (out, in/groups * prod(k))
    embedding   (vocabulary, width)       (width, vocabulary)
    experts     (E, out, in)              (E, out, in)
    experts     (E, in, out)              (E, out, in): each matrix transposed

Methods use only the protocol below, so each works on every kind. A base layer keeps the wrapped module and reads
`module.weight` at each call: a parameter kept from before sharding would silently be a stale copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.distributed import full_tensor, local, put, zeros_sharded_like
from lora_lightning.errors import AdapterStateError

Kind = Literal["linear", "conv", "embedding", "experts"]


class BaseLayer(ABC):
    """A frozen layer as methods see it.

    Attributes:
        kind: how inputs look; "embedding" takes token ids.
        d_in: columns of `weight()`.
        d_out: rows of `weight()`.
        lead: leading axes of `weight()`; empty unless experts are stacked.
    """

    kind: Kind
    d_in: int
    d_out: int
    lead: tuple[int, ...] = ()

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.sharded: Tensor | None = None
        """The parameter that holds the weight's shards; what a gathered unit shows instead is a passing copy."""
        self.read_pretrained: Callable[[torch.dtype], Tensor] | None = None
        """How the adapted layer around reads the weight as it was before anything was folded into it."""
        self._cache: dict[Hashable, tuple[tuple[int, ...], Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The wrapped layer itself, with its bias and its hooks."""
        return cast(Tensor, self.module(x))

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight, in its own layout."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def beneath(self) -> BaseLayer:
        """The layer without adapters that are below this one, whose weight an adapter that stacks reads."""
        return self

    @property
    def bias(self) -> Tensor | None:
        """Bias (d_out,), or None."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    @property
    def dense(self) -> bool:
        """True where calling the layer is x W^T + b with the stored weight and nothing else, hooks included."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.stored.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored weight."""
        return self.stored.dtype

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Data type of trained tensors: float32 at least, because bfloat16 loses small updates."""
        return torch.promote_types(self.dtype, torch.float32)

    def weight_name(self, path: str) -> str:
        """The weight's name in the plain model, for a layer at `path`."""
        return f"{path}.weight"

    def zeros(self, *size: int) -> Tensor:
        """Zeros (*lead, *size) where and in the data type in which adapters hold their tensors."""
        return torch.zeros((*self.lead, *size), dtype=self.adapter_dtype, device=self.device)

    def zeros_like_weight(self) -> Tensor:
        """Zeros (*lead, d_out, d_in) in the data type of adapters, sharded where the weight is."""
        if not isinstance(self.stored, DTensor):
            return self.zeros(self.d_out, self.d_in)
        return zeros_sharded_like(self._read(self.stored.detach()), self.adapter_dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as (d_out, d_in), a view where no cast is asked for.

        One that is sharded is gathered: outside the forward of its unit all processes take part.
        """
        stored = self.stored
        weight = self._read(full_tensor(stored) if isinstance(stored, DTensor) else stored)
        return weight if dtype is None else weight.to(dtype)

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (d_out, d_in) without what has been folded into it."""
        return self.weight(dtype) if self.read_pretrained is None else self.read_pretrained(dtype)

    def write(self, weight: Tensor) -> None:
        """Write a full weight, as (d_out, d_in), in place, rounded once to the stored dtype."""
        self.check_writable()
        put(self.stored, self._store(weight))

    def check_writable(self) -> None:
        """Raise `AdapterStateError` where a write would be lost: what a gathered unit shows is a passing copy."""
        if self.sharded is not None and not isinstance(self.stored, DTensor):
            raise AdapterStateError(
                "the weight is sharded and is gathered now, so that what is written would be lost; call "
                "lora_lightning.distributed.reshard on the model first, outside its forward."
            )

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever the weight is written or replaced."""
        if self.sharded is None:
            return self.stored._version, self.stored.data_ptr()
        # not of what is gathered, which changes no version; writes to a sharded parameter change one of two counts
        with torch.no_grad():
            shard = local(self.sharded)
        return self.sharded._version, shard._version, shard.data_ptr()

    def cached(self, key: Hashable, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """`fn(weight())`, computed again only when `version` has changed; never written to any file."""
        version, value = self._cache.get(key, (None, None))
        if value is None or version != self.version:
            value = fn(self.weight()).detach()
            self._cache[key] = (self.version, value)
        return value

    @abstractmethod
    def _read(self, stored: Tensor) -> Tensor:
        """The stored layout as (d_out, d_in), without copying."""

    @abstractmethod
    def _store(self, weight: Tensor) -> Tensor:
        """(d_out, d_in) in the stored layout."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same operation with another weight (d_out, d_in) and bias; stride, padding and look-up are kept."""
        tensors: dict[str, Tensor | None] = {"weight": self._store(weight)}
        if self.bias is not None or bias is not None:
            tensors["bias"] = bias
        return cast(Tensor, functional_call(self.module, cast("dict[str, Tensor]", tensors), (x,)))

    def per_output(self, values: Tensor) -> Tensor:
        """`values` (d_out,) shaped to broadcast over an output of the layer."""
        return values

    @abstractmethod
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Apply A (r, d_in) in place of the weight, without bias and hooks; the rank axis is the last: (..., r).

        A grouped convolution gives (..., groups, r), since each group of channels is seen by the same rows of A.
        """

    @abstractmethod
    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * B h for h as `down` gives it and B (d_out, r), in `onto`'s layout and dtype."""


def rows_product(x: Tensor, A: Tensor) -> Tensor:
    """x A^T for x (..., d_in) and A (r, d_in): the same numbers whether or not A requires a gradient.

    Of rows that are not contiguous torch multiplies a folded copy where a gradient is required, and a batch of matrices
    where none is, which some CPUs round differently.
    """
    return F.linear(x.contiguous(), A)


def plus_product(onto: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Sum onto + scale * left @ right of matrices, or of stacks of them, without a second tensor like `onto`.

    It lies in memory as `onto` does, since a kernel that reads it may sum in another order for another layout.
    """
    if onto.mT.is_contiguous() and not onto.is_contiguous():
        return plus_product(onto.mT, right.mT, left.mT, scale).mT
    add = torch.addmm if onto.dim() == 2 else torch.baddbmm
    return add(onto, left, right, alpha=scale)


def add_product(onto: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """Sum onto (..., d_out) + scale * h (..., r) B^T, without a second tensor of the size of `onto`."""
    if onto.dim() == 1:
        return onto + scale * (B @ h)
    total = torch.addmm(onto.flatten(0, -2), h.flatten(0, -2), B.mT, alpha=scale)
    return total if onto.dim() == 2 else reshaped(total, onto.shape)


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor`, which nobody else holds, in another shape; no view to autograd, so it may be changed in place."""
    return torch.ops.aten._unsafe_view(tensor, list(shape))  # type: ignore[no-any-return]


class BaseAround(BaseLayer):
    """A base layer around another one; what a subclass does not say is the inner layer's."""

    def __init__(self, wrapped: BaseLayer) -> None:
        super().__init__(wrapped.module)
        self.wrapped, self.sharded = wrapped, wrapped.sharded
        self.kind, self.d_in, self.d_out, self.lead = wrapped.kind, wrapped.d_in, wrapped.d_out, wrapped.lead

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The layer called another way."""

    def weight_name(self, path: str) -> str:
        """As of the layer."""
        return self.wrapped.weight_name(path)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """As of the layer."""
        return self.wrapped.weight(dtype)

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """As of the layer."""
        return self.wrapped.pretrained_weight(dtype)

    def cached(self, key: Hashable, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """As of the layer, whose cache outlives this object."""
        return self.wrapped.cached(key, fn)

    def _read(self, stored: Tensor) -> Tensor:
        return self.wrapped._read(stored)

    def _store(self, weight: Tensor) -> Tensor:
        return self.wrapped._store(weight)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As of the layer, without what is around it."""
        return self.wrapped.apply(x, weight, bias)

    def per_output(self, values: Tensor) -> Tensor:
        """As of the layer."""
        return self.wrapped.per_output(values)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """As of the layer."""
        return self.wrapped.down(x, A)

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """As of the layer."""
        return self.wrapped.up(h, B, onto, scale)


class StackedBase(BaseAround):
    """A base layer with an adapter on it, seen by the next adapter as its base."""

    def __init__(self, wrapped: BaseLayer, adapter: Any) -> None:
        super().__init__(wrapped)
        self.adapter = adapter

    def __call__(self, x: Tensor) -> Tensor:
        """The layer with this adapter on it."""
        return cast(Tensor, self.adapter(x, self.wrapped))

    @property
    def beneath(self) -> BaseLayer:
        """The layer below all adapters that stack; what has been folded stays on it."""
        return self.wrapped.beneath if getattr(self.adapter, "stacks", False) else self

    @property
    def bias(self) -> Tensor | None:
        """The merged bias, (d_out,), or None."""
        return cast("Tensor | None", self.adapter.merged_bias(self.wrapped.bias))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The merged weight, (d_out, d_in)."""
        weight = self.wrapped.weight(dtype)
        if getattr(self.adapter, "stacks", False):
            return cast(Tensor, self.adapter.merged_onto(weight, self.wrapped.beneath.weight(dtype)))
        return cast(Tensor, self.adapter.merged_weight(weight))

    def cached(self, key: Hashable, fn: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002 - the adapter below trains
        """`fn(weight())`, computed each time."""
        return fn(self.weight())
