"""NEATAdapter: a small network of the frozen weight, on any kind of layer.

Zhong et al., 2024, arXiv:2410.01870; depth as in peft's PEANuT.

    H = f(A W)                                   f is the activation
    depth times, i = 1..d:  keep H, H = f(E_i H)
    depth times, i = 1..d:  H = f(D_i H) + what was kept last
    y = W x + b + s B (H x),   W' = W + s B H

    paper  here          shape (out, in as nn.Linear stores it)
    W      weight        (d_out, d_in)      frozen
    A      reader        (rank, d_out)      it reads the weight, so it faces outputs, too
    B      writer        (d_out, rank)      zero at the start
    E, D   inner         (2 depth, rank, rank)   E_1 ... E_d, D_1 ... D_d
    H      hidden        (rank, d_in)       all that is formed; the update itself never is
    s      scaling

Departs from the paper: nothing known of the function. Convolutions, embeddings and stacked experts are adapted as well;
of an embedding all tokens move, since each has its column of H.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from transformers.activations import ACT2FN

from lora_lightning.adapters.base import Adapter, check_rank, write_uniform, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank


class WeightProduct(torch.autograd.Function):
    """A W, for which backward reads W again: one in half precision, or quantized, would be kept widened otherwise."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, base: BaseLayer) -> Tensor:
        """A (*lead, rank, d_out) times the weight in the dtype of A."""
        ctx.base = base
        return A @ base.weight(A.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        """Gradient of A."""
        return G @ ctx.base.weight(G.dtype).mT, None


class NEATAdapter(Adapter):
    """The network of one layer's weight.

    Args:
        base: the layer.
        rank: hidden width, at most the smaller side of the weight.
        depth: hidden layers on each side.
        activation: name of the activation in transformers.
        scaling: s.

    Raises:
        SettingsError: rank above the layer's size.
    """

    inner: Tensor | None

    def __init__(self, base: BaseLayer, rank: int, *, depth: int, activation: str, scaling: float) -> None:
        super().__init__()
        check_rank(base, rank)
        self.rank, self.depth, self.activation, self.scaling = rank, depth, activation, scaling
        self.reader = nn.Parameter(base.zeros(rank, base.d_out))
        self.writer = nn.Parameter(base.zeros(base.d_out, rank))
        self.register_parameter("inner", nn.Parameter(base.zeros(2 * depth, rank, rank)) if depth else None)
        self._kept: tuple[Tensor, object, Tensor] | None = None

    def reset(self, generator: torch.Generator) -> None:
        """B at zero, everything else uniform by the length of its rows."""
        write_uniform(self.reader, generator)
        if self.inner is not None:
            write_uniform(self.inner, generator)
        write_zeros(self.writer)

    def hidden(self, product: Tensor) -> Tensor:
        """H (*lead, rank, d_in) for the product A W."""
        f, kept = ACT2FN[self.activation], []
        H = f(product)
        layers = [] if self.inner is None else self.inner.to(H.dtype).unbind(-3)
        for E in layers[: self.depth]:
            kept.append(H)
            H = f(E @ H)
        for D in layers[self.depth :]:
            H = f(D @ H) + kept.pop()
        return cast(Tensor, H)

    def _hidden(self, base: BaseLayer) -> Tensor:
        """H for this call; in evaluation that of the last call, while no tensor behind it has changed."""
        with torch.autocast(base.device.type, enabled=False):
            # parameters of a sharded unit are gathered anew for each call, which no version tells
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or isinstance(self, FSDPModule):
                self._kept = None
                return self.hidden(WeightProduct.apply(self.reader, base))  # type: ignore[no-untyped-call]
            mark = base.cached("ll_neat: the weight is the same", lambda weight: weight.new_empty(0))
            state = [(p._version, p.data_ptr()) for p in self.parameters()]
            if self._kept is None or self._kept[0] is not mark or self._kept[1] != state:
                self._kept = mark, state, self.hidden(self.reader @ base.weight(self.reader.dtype))
            return self._kept[2]

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B (H x)."""
        return add_low_rank(base, x, self._hidden(base), self.writer, self.scaling)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B H, for H of the weight as it is given: the frozen one, before any other merge."""
        with torch.autocast(weight.device.type, enabled=False):
            H = self.hidden(self.reader.to(weight.dtype) @ weight)
            return plus_product(weight, self.writer.to(weight.dtype), H, self.scaling)

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """Everything that trains, as PEANuT has it."""
        found = {"peanut_A.weight": self.reader, "peanut_B.weight": self.writer}
        for at, layer in enumerate([] if self.inner is None else self.inner):
            side = "encoders" if at < self.depth else "decoders"
            found[f"peanut_{side}.{at % self.depth}.weight"] = layer
        return found

    def extra_repr(self) -> str:
        """The network's settings for `print(model)`."""
        return f"rank={self.rank}, depth={self.depth}, activation={self.activation}, scaling={self.scaling:g}"
