"""DoRAAdapter: a magnitude for each output and a low-rank change of direction, on any kind of layer.

Liu et al., 2024, arXiv:2402.09353; equations and symbols in `functional.py`.

Departs from the paper: convolutions (grouped ones too, with one B a group) and embeddings are adapted as well; the norm
of an embedding runs over the vocabulary, one magnitude for each of its dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ll_dora import functional
from lora_lightning.adapters.base import Adapter, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.adapters.weight_change import weight_change
from lora_lightning.distributed import assembled

_SQUARES = "ll_dora: squared row norms"


class DoRAAdapter(PairAdapter):
    """A magnitude on one layer, with a pair of factors for the direction or without.

    Args:
        base: the layer; kept, because a reset starts the magnitude from its weight as it is then.
        rank: inner width of the change of direction, at most the smaller side of the weight; 0 for no factors.
        scaling: s.
        dropout: probability of dropping entries of the adapted part's input while training.
        detach_norm: whether the row norm is a constant in backward.

    Raises:
        SettingsError: rank above the layer's size; dropout on token ids.
    """

    stacks = True
    takes_start = True

    def __init__(
        self, base: BaseLayer, *, rank: int, scaling: float, dropout: float = 0.0, detach_norm: bool = True
    ) -> None:
        super().__init__()
        self.base, self.detach_norm = base, detach_norm
        self.magnitude = nn.Parameter(base.zeros(base.d_out))
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout)
        if not rank:
            self.shown = "magnitude alone"
        self._eval_ratio: tuple[Tensor, object, Tensor] | None = None

    def reset_others(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing here is random
        """Magnitude at the row norms of the base weight."""
        write_values(self.magnitude, functional.squared_row_norms(self.base.weight().detach()).sqrt())

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """c (x~ W^T + s x~ A^T B^T) with the bias and the undropped product beside it; see `functional`."""
        c = self._ratio(base.beneath)
        if not self.rank:
            y = base(x)
            return functional.scale_output(base, y, functional.without_bias(base, y), c)
        dropout = self.dropout if self.training else 0.0
        return functional.add_decomposed(base, x, *self.factors(), c, self.scaling, dropout)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """c (W + s B A)."""
        return self.merged_onto(weight, weight)

    def merged_onto(self, weight: Tensor, plain: Tensor) -> Tensor:
        """c (W' + s B A), for c of the plain W and W' with what is below."""
        c = self._ratio_of(plain, functional.squared_row_norms(plain))
        if not self.rank:
            return (c[..., None] * weight).to(weight.dtype)
        return functional.decomposed_weight(weight, *self.factors(), c, self.scaling).to(weight.dtype)

    def _ratio(self, base: BaseLayer) -> Tensor:
        """Ratio c for this call; in evaluation the one of the last call, while no tensor behind it has changed."""
        if torch.compiler.is_compiling():  # a compiled graph keeps no tensor between calls
            weight = base.weight()
            return self._ratio_of(weight, functional.squared_row_norms(weight))
        squares = base.cached(_SQUARES, functional.squared_row_norms)
        # parameters of a sharded unit are gathered anew for each call, which no version tells
        if self.training or torch.is_grad_enabled() or isinstance(self, FSDPModule):
            self._eval_ratio = None
            return self._ratio_of(base.weight(), squares)
        # a base that cannot tell whether it has changed gives new squares at each call
        state = [(p._version, p.data_ptr()) for p in self.parameters()]
        if self._eval_ratio is None or self._eval_ratio[0] is not squares or self._eval_ratio[1] != state:
            self._eval_ratio = squares, state, self._ratio_of(base.weight(), squares)
        return self._eval_ratio[2]

    def _ratio_of(self, weight: Tensor, squares: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            if not self.rank:
                return functional.ratio(self.magnitude.to(squares.dtype), squares)
            return functional.decomposed_ratio(
                weight, squares, *self.factors(), self.magnitude, self.scaling, self.detach_norm
            )

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """The magnitude."""
        return {"lora_magnitude_vector": self.magnitude}

    def zero_rows(self) -> int:
        """Rows of the base weight without a direction; they follow their factors alone until these give them one."""
        return int((self.base.cached(_SQUARES, functional.squared_row_norms) == 0).sum())


@torch.no_grad()
def survey(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Mean dM and dD between pretrained and merged weights over layers, zero rows in all, and both by layer."""
    layers = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, DoRAAdapter):
            dtype = adapter.base.adapter_dtype
            with assembled(adapter):
                merged = adapter.merged_weight(adapter.base.weight(dtype))
            change = weight_change(merged, adapter.base.pretrained_weight(dtype))
            layers[path] = {"dM": change.magnitude, "dD": change.direction, "zero_rows": adapter.zero_rows()}
    count = max(1, len(layers))
    return {
        "dM": sum(layer["dM"] for layer in layers.values()) / count,
        "dD": sum(layer["dD"] for layer in layers.values()) / count,
        "zero_rows": sum(layer["zero_rows"] for layer in layers.values()),
        "layers": layers,
    }
