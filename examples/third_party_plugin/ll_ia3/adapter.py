"""IA3Adapter: a vector of scales on one layer.

Liu et al., 2022, arXiv:2205.05638, section 3.3.

    side "output"    y = l * (x W^T + b)      W' = diag(l) W,  b' = l * b
    side "input"     y = (l * x) W^T + b      W' = W diag(l),  b' = b

    paper      here     shape (out, in as nn.Linear stores it)
    l_k, l_v   scale    (d_out,)   side "output" of the key and value layers; starts at one
    l_ff       scale    (d_in,)    side "input" of the second feed-forward layer; starts at one

Departs from the paper: a bias is scaled with the output; the paper's model has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError


class IA3Adapter(Adapter):
    """Scales on the outputs or the inputs of a layer.

    Args:
        base: the layer.
        side: "output" or "input".

    Raises:
        SettingsError: side "input" on a layer that is not linear.
    """

    def __init__(self, base: BaseLayer, *, side: str) -> None:
        super().__init__()
        if side == "input" and base.kind != "linear":
            raise SettingsError(f'IA3.side is "input"; on a layer of kind "{base.kind}" it must be "output".')
        self.side = side
        self.scale = nn.Parameter(base.zeros(base.d_out if side == "output" else base.d_in) + 1)

    def reset(self, generator: torch.Generator) -> None:  # noqa: ARG002 - the start is not random
        """All ones."""
        with torch.no_grad():
            self.scale.fill_(1.0)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """l * base(x), or base(l * x)."""
        if self.side == "input":
            return base(_scaled(x, self.scale))
        return _scaled(base(x), base.per_output(self.scale))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """diag(l) W, or W diag(l)."""
        scale = self.scale[..., None] if self.side == "output" else self.scale
        return (scale * weight).to(weight.dtype)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """l * b, or b."""
        return bias if bias is None or self.side == "input" else self.scale.to(bias.dtype) * bias


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    # scale - 1 before it is rounded to the values' dtype: bfloat16 keeps little of a scale near 1
    return torch.addcmul(values, values, (scale - 1).to(values.dtype))
