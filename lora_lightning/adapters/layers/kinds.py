"""Kinds of base layers, and which of them a module is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.layers.base import BaseLayer, add_product, plus_product, rows_product


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
        return rows_product(x, A)

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
        return rows_product(x, A)

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * h B^T, (..., d_out)."""
        return add_product(onto, h, B, scale)


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


class ConvBase(BaseLayer):
    """Conv1d, Conv2d and Conv3d, grouped and dilated too; A is flattened to (r, in/groups * prod(kernel))."""

    kind = "conv"

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
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
            update = rows_product(h, B)
        else:
            update = torch.einsum("...gr,gor->...go", h, B.view(self.groups, -1, B.shape[1])).flatten(-2)
            update = update.to(onto.dtype)  # of rank 1 it is no matrix product, which autocast would have cast
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
        weight: (E, d_out, d_in), or (E, d_in, d_out) where `transposed`; (d_out, d_in) is one such matrix.
        transposed: how the matrices are stored.
        siblings: where the stack stands for a parameter of an owner: names of all of the owner's parameters, in order.
        alone: whether that parameter is no experts', and is reached by its name only.
    """

    def __init__(
        self, weight: nn.Parameter, transposed: bool, siblings: tuple[str, ...] = (), alone: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed
        self.siblings = siblings
        self.alone = alone

    @property
    def owned(self) -> bool:
        """Whether it stands for a parameter, and so is no module of the plain model."""
        return bool(self.siblings)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the parameter that it stands for while nobody computes with it."""
        if name in ("dtype", "device", "shape", "ndim", "requires_grad"):
            return getattr(self.weight, name)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """(E, n, d_in) to (E, n, d_out)."""
        return x @ (self.weight if self.transposed else self.weight.mT)


class ExpertsBase(BaseLayer):
    """A stacked expert parameter; A and B have one matrix an expert, (E, r, d_in) and (E, d_out, r).

    A single matrix that is a parameter counts as a stack of one.
    """

    kind = "experts"

    def __init__(self, module: ExpertStack) -> None:
        super().__init__(module)
        self.transposed, self.owned, self.single = module.transposed, module.owned, module.weight.dim() == 2
        experts, self.d_out, self.d_in = self._read(module.weight).shape
        self.lead = (experts,)

    def weight_name(self, path: str) -> str:
        """The path itself, where that is a parameter's in the plain model."""
        return path if self.owned else super().weight_name(path)

    def _read(self, stored: Tensor) -> Tensor:
        stack = stored[None] if self.single else stored
        return stack.mT if self.transposed else stack

    def _store(self, weight: Tensor) -> Tensor:
        stack = weight.mT if self.transposed else weight
        return stack[0] if self.single else stack

    def per_output(self, values: Tensor) -> Tensor:
        """`values` (E, d_out) as (E, 1, d_out)."""
        return values.unsqueeze(-2)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Products x[e] A[e]^T, (E, n, r)."""
        return x @ A.mT

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sums onto[e] + scale * h[e] B[e]^T, (E, n, d_out)."""
        return plus_product(onto, h, B.mT, scale)


def core_base_layer(module: nn.Module) -> BaseLayer | None:
    """The base layer for a module, or None where no kind serves it.

    The weight must be a floating-point parameter of the module itself (not quantized, not computed by a
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
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = cls.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
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
