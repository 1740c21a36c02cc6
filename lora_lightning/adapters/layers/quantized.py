"""QuantizedBase: a frozen linear layer whose weight is quantized.

The layer is called as its package computes it. Its weight is read by dequantization, a new tensor at each reading, and
never written: merging puts a plain layer in its place, and taking that out again leaves the quantized layer as it was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.layers.base import BaseLayer, add_product, rows_product
from lora_lightning.errors import AdapterStateError

Gradient = Callable[[Tensor, Tensor], Tensor]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class QuantizedBase(BaseLayer):
    """A linear layer in a quantized format; a kind of its own answers `dequantize`.

    Args:
        module: the layer.
        quantized: name of the format.
        d_in: inputs.
        d_out: outputs.
        dtype: what the weight was quantized from; None where the layer does not tell, and `adopt` will.
        transposed: whether the layer stands for a Conv1D of transformers.

    Attributes:
        differentiable: whether the package's product has a backward, without which a layer has to be adapted.
        own_backward: whether it is used; otherwise the backward is formed here, from the weight dequantized again.
    """

    kind = "linear"
    differentiable: bool = True
    own_backward: bool = True

    def __init__(
        self,
        module: nn.Module,
        quantized: str,
        d_in: int,
        d_out: int,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(module)
        self.format, self.d_in, self.d_out = quantized, d_in, d_out
        self.plain_dtype, self.transposed = dtype, transposed

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight (d_out, d_in) as the layer's product uses it, in a floating-point dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the plain layer that this one stands for."""
        return torch.float32 if self.plain_dtype is None else self.plain_dtype

    def adopt(self, dtype: torch.dtype) -> None:
        """Take the data type of the model's other weights where the layer does not tell its own."""
        if self.plain_dtype is None:
            self.plain_dtype = dtype

    @property
    def plain_shape(self) -> tuple[int, int]:
        """Shape of the plain layer's weight, in its own layout."""
        return (self.d_in, self.d_out) if self.transposed else (self.d_out, self.d_in)

    @property
    def version(self) -> tuple[int, ...]:
        """Changes when the weight is replaced."""
        return self.stored._version, id(self.stored)

    def __call__(self, x: Tensor) -> Tensor:
        """The wrapped layer itself, with its bias and its hooks."""
        if self.own_backward or (self.differentiable and not self.bare):
            return cast(Tensor, self.module(x))
        return self.product(x, torch.matmul)

    @property
    def bare(self) -> bool:
        """Whether no hooks stand on the layer, so that calling it is its product."""
        return not any(self.module.__dict__[name] for name in _HOOKS)

    def product(self, x: Tensor, gradient: Gradient) -> Tensor:
        """The layer's own output, with another way to its input's gradient; for a layer that is `bare`.

        Args:
            x: (..., d_in).
            gradient: makes dx (N, d_in) of G (N, d_out) and the weight (d_out, d_in), dequantized again in G's dtype.
        """
        y: Tensor = FrozenProduct.apply(x, self, gradient)  # type: ignore[no-untyped-call]
        return y

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantized weight (d_out, d_in), in the plain layer's dtype unless told otherwise."""
        with torch.no_grad():
            return self.dequantize().to(self.dtype if dtype is None else dtype)

    def write(self, weight: Tensor) -> None:  # noqa: ARG002 - the signature of every base layer
        """Refuse.

        Raises:
            AdapterStateError: always.
        """
        raise AdapterStateError(f"the weight is stored as {self.format}, which cannot be written without another loss.")

    @property
    def parts(self) -> list[Tensor]:
        """Plain tensors that the weight is stored in; a kind that keeps scales elsewhere adds them."""
        return flattened(self.stored.data)

    @property
    def held(self) -> int:
        """Bytes of the weight as it is stored."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A frozen plain layer with this weight (d_out, d_in) and bias, rounded once, and with the layer's hooks."""
        module: nn.Module
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            module, weight = Conv1D(self.d_out, 0), weight.mT.contiguous()
            cast(Any, module).nx = self.d_in
            bias = weight.new_zeros(self.d_out) if bias is None else bias
        else:
            with torch.device("meta"):
                module = nn.Linear(self.d_in, self.d_out, bias=bias is not None)
        module.weight = nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(self.dtype, copy=True), requires_grad=False)
        for name in _HOOKS:
            module.__dict__[name] = self.module.__dict__[name].copy()
        module.register_forward_pre_hook(_take_any_dtype)
        module.register_forward_hook(_give_back_dtype)
        return module.train(self.module.training)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + bias with another weight (d_out, d_in)."""
        return F.linear(x, weight, bias)

    def _read(self, stored: Tensor) -> Tensor:  # noqa: ARG002 - the quantized numbers alone say too little
        return self.weight()

    def _store(self, weight: Tensor) -> Tensor:
        return weight

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Product x A^T, (..., r)."""
        return rows_product(x, A)

    def up(self, h: Tensor, B: Tensor, onto: Tensor, scale: float = 1.0) -> Tensor:
        """Sum onto + scale * h B^T, (..., d_out)."""
        # packages keep their input's dtype under autocast, so must what is added to their output
        with torch.autocast(onto.device.type, enabled=False):
            return add_product(onto, h.to(onto.dtype), B.to(onto.dtype), scale)


def _take_any_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Quantized layers take inputs of any data type, whatever theirs is."""
    x, weight = inputs[0], cast(Tensor, module.weight)
    module.__dict__["_input_dtype"] = x.dtype
    return (x.to(weight.dtype), *inputs[1:])


def _give_back_dtype(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output.to(module.__dict__.pop("_input_dtype"))


def flattened(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the plain ones inside one that stands for others, in their order."""
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in flattened(getattr(tensor, name))]


class FrozenProduct(torch.autograd.Function):
    """The layer's own forward, and a gradient made of G and W: W is dequantized again in backward, nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: QuantizedBase, gradient: Gradient) -> Tensor:
        """Call the layer."""
        ctx.base, ctx.gradient, ctx.dtype = base, gradient, x.dtype
        return cast(Tensor, base.module(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x."""
        # products in forward autocast, those in backward must not: G has the right dtype already
        with torch.autocast(G.device.type, enabled=False):
            dx = ctx.gradient(G.reshape(-1, G.shape[-1]), ctx.base.weight(G.dtype))
        return dx.view(*G.shape[:-1], dx.shape[-1]).to(ctx.dtype), None, None
