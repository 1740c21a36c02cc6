"""InputShortcuts: what earlier layers of the same type have been given, or have made of it, joins the low-rank branch.

    input shortcut    y_n = W_n x_n + s B_n A_n (x_n + x_(n-1))
    middle shortcut   y_n = W_n x_n + s B_n sum_(k = 0..m) A_(n-k) x_(n-k)

    u   the branch's own value: x_n, or A_n x_n
    v   what joins it: x_(n-1), or the sum over k >= 1
    c   v is taken for c u where a fixed weight has to do:   W_n + (1 + c) s B_n A_n

Values cross layers and no tensors do: an adapter leaves them in the context of the forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.base import Approximation, RunningSum, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.low_rank import factor_dtype
from lora_lightning.adapters.nearness import SIZE, Estimate, approximate, norm, observe
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.gates import leave, left_by

MEANS = "path_means"
"""Name of the statistic, and of the buffer with its means."""


class InputShortcuts(PairAdapter):
    """A pair of factors whose branch reads values of earlier layers.

    Args:
        base: the layer.
        rank: inner width of the pair.
        scaling: s.
        dropout: probability of dropping entries of the branch's input while training.
        middle: whether A x crosses layers, instead of x.
        estimate: how c is found.

    Raises:
        SettingsError: token ids, or stacked experts, which hand no input on.

    Attributes:
        earlier: adapters whose values it reads, nearest first; set by `Method.link`.
        is_read: whether a later layer reads it.
        doubles: whether the input joins itself, as in the first layer of a chain.
    """

    additive = True
    mergeable = False
    path_means: Tensor

    def __init__(
        self, base: BaseLayer, rank: int, scaling: float, dropout: float, middle: bool, estimate: Estimate
    ) -> None:
        super().__init__()
        if base.kind in ("embedding", "experts"):
            raise SettingsError(f"{base.kind} has no input that another layer could read; exclude it.")
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout)
        self.middle, self.estimate = middle, estimate
        self.earlier: tuple[InputShortcuts, ...] = ()
        self.is_read = self.doubles = False
        self.sums = RunningSum()
        self.register_buffer(MEANS, torch.zeros(SIZE, device=base.device))

    def reset_others(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing here is random
        """Forget what was measured."""
        write_zeros(self.path_means)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B (A drop(x + x')), or base(x) + s B (A drop(x) + h')."""
        y, dtype = base(x), factor_dtype(base, x)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        dropout = self.dropout if self.training else 0.0
        u = base.down(F.dropout(x, dropout), A) if self.middle else x
        if self.is_read:
            leave(self, u, norm(x))
        read = [(x, norm(x))] if self.doubles else [left_by(adapter) for adapter in self.earlier]
        if any(value.shape != u.shape for value, _ in read):
            raise AdapterStateError(
                f"a layer is given {tuple(x.shape)} and an earlier one of its type had another shape, so that their "
                "values do not add up; exclude such layers, or take block shortcuts."
            )
        v = sum((value.to(u) for value, _ in read[1:]), read[0][0].to(u)) if read else None
        if self.training:
            observe(self.sums, x, [size.to(x.device) for _, size in read], u, v)
        total = u if v is None else u + v
        h = total if self.middle else base.down(F.dropout(total, dropout), A)
        return base.up(h, B, onto=y, scale=self.scaling)

    def merged_weight(self, weight: Tensor) -> Tensor:  # noqa: ARG002 - there is none
        """None: the update depends on what other layers were given.

        Raises:
            AdapterStateError: always.
        """
        raise AdapterStateError("an update that reads values of earlier layers depends on its input.")

    def approximation(self) -> Approximation:
        """(1 + c) s B A, and how far c u was from v over the last steps."""
        return approximate(self.path_means, self.estimate, self.lora_A, self.scaling * self.lora_B)

    def statistics(self) -> Mapping[str, RunningSum]:
        """Norms and products of own and joined values."""
        return {MEANS: self.sums}
