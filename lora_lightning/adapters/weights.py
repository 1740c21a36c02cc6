"""BaseLayer: the one way to call a frozen layer and to read or write its weight, whatever stores it.

    kind        stored as                 read as (d_out, d_in)
    linear      (out, in)                 (out, in)
    linear      Conv1D of transformers    (out, in): the stored (in, out), transposed
    conv        (out, in/groups, *k)      (out, in/groups * prod(k))
    embedding   (vocabulary, width)       (width, vocabulary)
    experts     (E, out, in)              (E, out, in)
    experts     (E, in, out)              (E, out, in): each matrix transposed

Methods use only the protocol below, so each works on every kind. An accessor keeps the wrapped module and reads
`module.weight` at each call: a parameter kept from before sharding would silently be a stale copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.errors import AdapterStateError
from lora_lightning.pieces import local, put, whole, zeros_laid_out

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
        self.pieces: Tensor | None = None
        """The parameter that holds the weight's pieces; what a gathered unit shows instead is a passing copy."""
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
        """Zeros (*lead, d_out, d_in) in the data type of adapters, in pieces where the weight is."""
        if not isinstance(self.stored, DTensor):
            return self.zeros(self.d_out, self.d_in)
        return zeros_laid_out(self._read(self.stored.detach()), self.adapter_dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as (d_out, d_in), a view where no cast is asked for.

        One that lies in pieces is gathered: outside the forward of its unit all processes take part.
        """
        stored = self.stored
        weight = self._read(whole(stored) if isinstance(stored, DTensor) else stored)
        return weight if dtype is None else weight.to(dtype)

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (d_out, d_in) without what has been folded into it."""
        return self.weight(dtype) if self.read_pretrained is None else self.read_pretrained(dtype)

    def write(self, weight: Tensor) -> None:
        """Write a weight given whole, as (d_out, d_in), in place, rounded once to the stored dtype."""
        self.check_writable()
        put(self.stored, self._store(weight))

    def check_writable(self) -> None:
        """Raise `AdapterStateError` where a write would be lost: what a gathered unit shows is a passing copy."""
        if self.pieces is not None and not isinstance(self.stored, DTensor):
            raise AdapterStateError(
                "the weight lies in pieces and is gathered now, so that what is written would be lost; call "
                "lora_lightning.sharding.reshard on the model first, outside its forward."
            )

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever the weight is written or replaced."""
        if self.pieces is None:
            return self.stored._version, self.stored.data_ptr()
        # not of what is gathered, which moves no version; writes to a sharded parameter move one of two counts
        with torch.no_grad():
            piece = local(self.pieces)
        return self.pieces._version, piece._version, piece.data_ptr()

    def cached(self, key: Hashable, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """`fn(weight())`, computed again only when `version` has moved; never written to any file."""
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


class LinearBase(BaseLayer):
    """nn.Linear."""

    kind = "linear"

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.d_in, self.d_out = module.in_features, module.out_features

    @property
    def dense(self) -> bool:
        """True without hooks."""
        return not _hooked(self.module)

    def _read(self, stored: Tensor) -> Tensor:
        return stored

    def _store(self, weight: Tensor) -> Tensor:
        return weight

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Product x A^T, (..., r)."""
        return F.linear(x, A)

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * h B^T, (..., d_out)."""
        return add_product(onto, h, B, scale)


class TransposedBase(BaseLayer):
    """Conv1D of transformers (GPT-2): a linear layer whose weight is stored as (in, out)."""

    kind = "linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.d_in, self.d_out = cast(Tensor, module.weight).shape

    @property
    def dense(self) -> bool:
        """True without hooks."""
        return not _hooked(self.module)

    def _read(self, stored: Tensor) -> Tensor:
        return stored.mT

    def _store(self, weight: Tensor) -> Tensor:
        return weight.mT

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Output x W^T + bias for W (d_out, d_in)."""
        # its forward is an addmm, which cannot do without a bias
        bias = weight.new_zeros(self.d_out) if bias is None else bias
        return cast(Tensor, functional_call(self.module, {"weight": weight.mT, "bias": bias}, (x,)))

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Product x A^T, (..., r)."""
        return F.linear(x, A)

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * h B^T, (..., d_out)."""
        return add_product(onto, h, B, scale)


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


class ConvBase(BaseLayer):
    """Conv1d and Conv2d, grouped and dilated too; A is flattened to (r, in/groups * prod(kernel))."""

    kind = "conv"

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(module)
        self.kernel = tuple(module.weight.shape[1:])
        self.groups = module.groups
        self.d_out, self.d_in = module.out_channels, math.prod(self.kernel)

    def _read(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _store(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, *self.kernel)

    def per_output(self, values: Tensor) -> Tensor:
        """`values` as (d_out, 1, ...)."""
        return values.view(-1, *[1] * (len(self.kernel) - 1))

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """The convolution with the rows of A as kernels, channels last: (..., *out, [groups,] r)."""
        kernels = self._store(A).repeat(self.groups, *[1] * len(self.kernel))
        conv = cast(nn.Conv2d, self.module)
        h: Tensor = conv._conv_forward(x, kernels, None).movedim(-len(self.kernel), -1)
        return h if self.groups == 1 else h.reshape(*h.shape[:-1], self.groups, A.shape[0])

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * a convolution of kernel size 1 with B; one B a group of output channels."""
        if self.groups == 1:
            update = F.linear(h, B)
        else:
            update = torch.einsum("...gr,gor->...go", h, B.view(self.groups, -1, B.shape[1])).flatten(-2)
        return onto.add(update.movedim(-1, -len(self.kernel)), alpha=scale)


class EmbeddingBase(BaseLayer):
    """nn.Embedding, scaled subclasses included; A has one column a token."""

    kind = "embedding"

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        self.d_in, self.d_out = module.num_embeddings, module.embedding_dim

    def _read(self, stored: Tensor) -> Tensor:
        return stored.mT

    def _store(self, weight: Tensor) -> Tensor:
        return weight.mT

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Columns of A for the token ids x, (..., r)."""
        if type(self.module).forward is nn.Embedding.forward:
            # not through the module, whose hooks (noise on embeddings, say) are for the whole vector
            module = cast(nn.Embedding, self.module)
            return F.embedding(x, A.mT, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
        return cast(Tensor, functional_call(self.module, {"weight": A.mT}, (x,)))

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * h B^T, (..., d_out)."""
        # a look-up keeps its dtype under autocast, so must what is added to it
        with torch.autocast(onto.device.type, enabled=False):
            return add_product(onto, h, B, scale)


class ExpertStack(nn.Module):
    """A stack of expert matrices as a layer of its own: y[e] = x[e] W[e]^T for x (E, n, d_in).

    Args:
        weight: (E, d_out, d_in), or (E, d_in, d_out) where `transposed`.
        transposed: how the matrices are stored.
        siblings: where the stack stands for a parameter of an owner: names of all of the owner's parameters, in order.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool, siblings: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed
        self.siblings = siblings

    @property
    def owned(self) -> bool:
        """Whether it stands for a parameter, and so is no module of the plain model."""
        return bool(self.siblings)

    def forward(self, x: Tensor) -> Tensor:
        """(E, n, d_in) to (E, n, d_out)."""
        return x @ (self.weight if self.transposed else self.weight.mT)


class ExpertsBase(BaseLayer):
    """A stacked expert parameter; A and B have one matrix an expert, (E, r, d_in) and (E, d_out, r)."""

    kind = "experts"

    def __init__(self, module: ExpertStack) -> None:
        super().__init__(module)
        self.transposed, self.owned = module.transposed, module.owned
        experts, self.d_out, self.d_in = self._read(module.weight).shape
        self.lead = (experts,)

    def weight_name(self, path: str) -> str:
        """The path itself, where that is a parameter's in the plain model."""
        return path if self.owned else super().weight_name(path)

    def _read(self, stored: Tensor) -> Tensor:
        return stored.mT if self.transposed else stored

    def _store(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def per_output(self, values: Tensor) -> Tensor:
        """`values` (E, d_out) as (E, 1, d_out)."""
        return values.unsqueeze(-2)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Products x[e] A[e]^T, (E, n, r)."""
        return x @ A.mT

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sums onto[e] + scale * h[e] B[e]^T, (E, n, d_out)."""
        return plus_product(onto, h, B.mT, scale)


def plus_product(onto: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Sum onto + scale * left @ right of matrices, or of stacks of them, without a second tensor like `onto`."""
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


def base_layer(module: nn.Module) -> BaseLayer | None:
    """The accessor for a module, or None where no kind serves it.

    The weight must be a floating-point parameter of the module itself (not packed to few bits, not computed by a
    parametrization). A subclass with a forward of its own is served only where a trial shows that its output is what
    the plain layer gives (linear), or linear in the weight (embedding); else a product of factors would not be the
    layer's update.
    """
    cls, weight = type(module), module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        plain = cls.forward is nn.Linear.forward or _trial(_is_linear, module)
        return LinearBase(module) if plain else None
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        plain = cls.forward in (nn.Conv1d.forward, nn.Conv2d.forward)
        return ConvBase(module) if plain else None
    if isinstance(module, nn.Embedding):
        plain = cls.forward is nn.Embedding.forward or _trial(_is_linear_in_weight, module)
        return EmbeddingBase(module) if plain and module.max_norm is None and not module.sparse else None
    if isinstance(module, ExpertStack):
        return ExpertsBase(module)
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return TransposedBase(module)
    return None


def _trial(holds: Callable[[Any], bool], module: nn.Module) -> bool:
    """Whether `holds` of a module of unknown origin; one that takes other arguments fails in its own way."""
    try:
        with torch.no_grad(), torch.autocast(next(module.parameters()).device.type, enabled=False):
            return holds(module)
    except Exception:
        return False


def _is_linear(module: nn.Linear) -> bool:
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    x = x.view(2, -1)
    return torch.allclose(module.forward(x), F.linear(x, module.weight, module.bias), rtol=1e-3, atol=1e-3)


def _is_linear_in_weight(module: nn.Embedding) -> bool:
    rows = max(module.padding_idx or 0, 0) + 1
    ids = torch.zeros(1, dtype=torch.long, device=module.weight.device)
    one = torch.linspace(-1, 1, rows * module.embedding_dim, dtype=module.weight.dtype, device=ids.device)
    one, two = one.view(rows, -1), one.square().view(rows, -1)
    outputs = [functional_call(module, {"weight": weight}, (ids,)) for weight in (one, two, one + two)]
    return outputs[2].shape[-1] == module.embedding_dim and torch.allclose(
        outputs[0] + outputs[1], outputs[2], rtol=1e-2, atol=1e-2
    )


class BaseAround(BaseLayer):
    """A base layer around another one; what a subclass does not say is the inner layer's."""

    def __init__(self, under: BaseLayer) -> None:
        super().__init__(under.module)
        self.under, self.pieces = under, under.pieces
        self.kind, self.d_in, self.d_out, self.lead = under.kind, under.d_in, under.d_out, under.lead

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The layer called another way."""

    def weight_name(self, path: str) -> str:
        """As of the layer."""
        return self.under.weight_name(path)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """As of the layer."""
        return self.under.weight(dtype)

    def pretrained_weight(self, dtype: torch.dtype) -> Tensor:
        """As of the layer."""
        return self.under.pretrained_weight(dtype)

    def cached(self, key: Hashable, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """As of the layer, whose cache outlives this object."""
        return self.under.cached(key, fn)

    def _read(self, stored: Tensor) -> Tensor:
        return self.under._read(stored)

    def _store(self, weight: Tensor) -> Tensor:
        return self.under._store(weight)

    def per_output(self, values: Tensor) -> Tensor:
        """As of the layer."""
        return self.under.per_output(values)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """As of the layer."""
        return self.under.down(x, A)

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """As of the layer."""
        return self.under.up(h, B, onto, scale)


class StackedBase(BaseAround):
    """A base layer with an adapter on it, seen by the next adapter as its base."""

    def __init__(self, under: BaseLayer, adapter: Any) -> None:
        super().__init__(under)
        self.adapter = adapter

    def __call__(self, x: Tensor) -> Tensor:
        """The layer with this adapter on it."""
        return cast(Tensor, self.adapter(x, self.under))

    @property
    def bias(self) -> Tensor | None:
        """The merged bias, (d_out,), or None."""
        return cast("Tensor | None", self.adapter.merged_bias(self.under.bias))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The merged weight, (d_out, d_in)."""
        return cast(Tensor, self.adapter.merged_weight(self.under.weight(dtype)))

    def cached(self, key: Hashable, fn: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002 - the adapter below trains
        """`fn(weight())`, computed each time."""
        return fn(self.weight())
