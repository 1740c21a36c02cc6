"""MultiLoRAAdapter: n low-rank updates in parallel, computed as one product.

Wang et al., 2023, arXiv:2311.11501.

    y = W x + s sum_i g_i * (B_i A_i x)                 * entry by entry
    W' = W + s [diag(g_1) B_1, ..., diag(g_n) B_n] [A_1; ...; A_n]

    paper  here        shape (out, in as nn.Linear stores it)
    W      weight      (d_out, d_in)      frozen
    A_i    lora_A      (n, rank, d_in)    stacked
    B_i    lora_B      (n, d_out, rank)   stacked
    g_i    gate        (n, d_out), or (n, 1) for one number a module
    s      scaling     alpha / rank

With gates at zero both factors start at U(-1/sqrt(m), 1/sqrt(m)), m the length of a row. The first step then moves
gates alone: dL/dA_i and dL/dB_i have g_i as a factor.

Departs from the paper: the scaling s, and one dropout mask for all modules. Its gates could not be read from the paper
itself: that they are vectors and start at zero is how it is cited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, write_uniform, write_values
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.distributed import assembled
from lora_lightning.errors import SettingsError

Gate = Literal["vector", "scalar"]


class MultiLoRAAdapter(PairAdapter):
    """Stacked pairs of factors on one layer, and a gate for each.

    Args:
        base: the layer.
        modules: number of pairs, n.
        rank: inner width of one.
        scaling: s.
        dropout: probability of dropping entries of the updates' input while training; one mask for all of them.
        gate: one number an output of the layer, or one number a module.
        zeros: whether gates start at zero; else at 1/n, with one factor of each pair at zero.

    Raises:
        SettingsError: dropout where no input passes; gates at zero on an embedding.
    """

    additive = True

    def __init__(
        self, base: BaseLayer, modules: int, rank: int, scaling: float, *, dropout: float, gate: Gate, zeros: bool
    ) -> None:
        super().__init__()
        if base.kind == "embedding" and zeros:
            raise SettingsError(
                'gate_start is "zero"; on an embedding the vectors of tokens that the data lacks would move with the '
                'gates. Take "mean" there, or exclude it.'
            )
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout, lead=(modules,))
        self.zeros = zeros
        self.gate = nn.Parameter(base.zeros(modules, base.d_out if gate == "vector" else 1))
        self.shown = f"modules={modules}, {self.shown}"

    def reset_others(self, generator: torch.Generator) -> None:
        """Gates, and with gates at zero the factor that starts at zero elsewhere."""
        start = 0.0 if self.zeros else 1.0 / self.gate.shape[-2]
        write_values(self.gate, torch.full(self.gate.shape, start, device=generator.device))
        if self.zeros:
            write_uniform(self.lora_B, generator)

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """([A_1; ...], (*lead, n rank, d_in)) and ([diag(g_1) B_1, ...], (*lead, d_out, n rank)); differentiable."""
        gated = self.gate[..., None] * self.lora_B
        return self.lora_A.flatten(-3, -2), gated.movedim(-3, -2).flatten(-2)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s sum_i g_i * (B_i A_i drop(x))."""
        return add_low_rank(base, x, *self.side_by_side(), self.scaling, self.dropout if self.training else 0.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s sum_i diag(g_i) B_i A_i."""
        A, B = self.side_by_side()
        return plus_product(weight, B.to(weight.dtype), A.to(weight.dtype), self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """One pair of rank n rank, gates and scaling folded into B."""
        A, B = self.side_by_side()
        return A.detach(), self.scaling * B.detach()


def leading_energy(A: Tensor, B: Tensor, count: int) -> float:
    """Fraction of |B A|^2 in its `count` leading singular values, of stacked experts together; 0 where B A is zero.

    Args:
        A: (*lead, R, d_in).
        B: (*lead, d_out, R).
        count: number of singular values.
    """
    right, left = torch.linalg.qr(A.double().mT).R, torch.linalg.qr(B.double()).R
    energy = torch.linalg.svdvals(left @ right.mT).square()
    total = float(energy.sum())
    return float(energy[..., :count].sum()) / total if total else 0.0


@torch.no_grad()
def energies(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Mean of `leading_energy` over layers, at the rank of one module, and layer by layer."""
    own = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, MultiLoRAAdapter)}
    with assembled(*own.values()):
        layers = {path: leading_energy(*adapter.low_rank(), adapter.rank) for path, adapter in own.items()}
    return {"leading_energy": sum(layers.values()) / max(1, len(layers)), "layers": layers}
