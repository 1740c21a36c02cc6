"""What CE-LoRA can save: operations a token and layer, two a multiply-add.

Chen et al., 2025, arXiv:2502.01378. For a layer of d_in inputs and d_out outputs with N tokens, over N:

    forward       2 d_in d_out + 2 r (d_in + d_out)              unchanged; twice where activations are recomputed
    dx, LoRA      2 d_in d_out
    dx, CE-LoRA   2 K d_in + 2 r0 (d_in + d_out)                 K kept channels
    adapter       4 r (d_in + d_out)                             dA, dB and its part of dx, always exact

    paper   here        meaning
    r       rank        width of the update
    r0      svd_rank    width of the split
    K       channels    kept output channels

Freezing has already removed the third large product (dW), so that dx is at most half of a step's work, a third with
recomputation: no setting makes a step more than 2 times, or 1.5 times, as fast. Gathers, attention, heads and optimizer
come off that.

Departs from the paper: nothing known; the paper's own accounting was not available.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.methods import Adapters


@dataclass(frozen=True)
class Layer:
    """Widths of one adapted layer."""

    d_in: int
    d_out: int
    rank: int
    channels: int
    """Kept output channels K; `d_out` for an exact layer, which has no split."""
    svd_rank: int

    @property
    def exact(self) -> bool:
        """Whether the backward pass is LoRA's."""
        return self.channels >= self.d_out


def flops(layers: Iterable[Layer], forwards: int = 1) -> int:
    """Operations a token of forward and backward; `forwards` is 2 where activations are recomputed."""
    total = 0
    for layer in layers:
        both, product = layer.d_in + layer.d_out, 2 * layer.d_in * layer.d_out
        cheap = 2 * layer.channels * layer.d_in + 2 * layer.svd_rank * both
        total += forwards * (product + 2 * layer.rank * both) + 4 * layer.rank * both
        total += product if layer.exact else cheap
    return total


def as_lora(layers: Iterable[Layer]) -> list[Layer]:
    """The same layers with an exact backward pass."""
    return [replace(layer, channels=layer.d_out) for layer in layers]


def without_base_gradient(layers: Iterable[Layer]) -> list[Layer]:
    """The same layers with dx of the frozen product left out altogether, which no setting can undercut."""
    return [replace(layer, channels=0, svd_rank=0) for layer in layers]


def split_elements(layers: Iterable[Layer]) -> int:
    """Numbers in B0 and A0 of all approximated layers."""
    return sum(layer.svd_rank * (layer.d_in + layer.d_out) for layer in layers if not layer.exact)


def survey(adapters: Adapters) -> dict[str, Any]:
    """Operations a token beside LoRA's, the largest possible speed-ups, and extra memory, over adapters of this method.

    Every layer's input is taken to need a gradient; the first layers of a frozen model do without in LoRA as well.
    Stacked experts, whose backward pass is exact, are counted as such; their operations, which the routing decides, are
    left out.
    """
    from ll_ce_lora.adapter import CELoRAAdapter

    own = [adapter for adapter in adapters.values() if isinstance(adapter, CELoRAAdapter)]
    layers = [Layer(a.d_in, a.d_out, a.lora_A.shape[0], a.channels, a.svd_rank) for a in own]
    lora, limit = as_lora(layers), without_base_gradient(layers)
    approximated = [layer for layer in layers if not layer.exact]
    return {
        "approximated_layers": len(approximated),
        "exact_layers": len(adapters) - len(approximated),
        "layers_with_chosen_channels": sum(adapter.index is not None for adapter in own),
        "lora_flops_per_token": flops(lora),
        "flops_per_token": flops(layers),
        "speedup_bound": _ratio(flops(lora), flops(layers)),
        "speedup_bound_checkpointed": _ratio(flops(lora, 2), flops(layers, 2)),
        "speedup_limit": _ratio(flops(lora), flops(limit)),
        "speedup_limit_checkpointed": _ratio(flops(lora, 2), flops(limit, 2)),
        "split_elements": split_elements(layers),
        "index_elements": sum(layer.d_out + layer.channels for layer in approximated),
    }


def _ratio(lora: int, own: int) -> float:
    return lora / own if own else 1.0
