"""What an adapter has folded into its layer so far: factors, or one dense update.

An adapter that trains in stages gives its update F_t away at the end of each, and starts again at zero. The sum of what
it gave is its folded update D; the next stage trains on W0 + D. f is the weight of the newest one.

    outer_step    D_t = D_t-1 + f F_t
    figure_ema    S_t = (1 - f) S_t-1 + f F_t,   D_t = D_t-1 + S_t

    FactoredUpdate   D = sum_k c_k B_k A_k   two factors a stage; no weight is touched, so any base will do
    DenseUpdate      D                       added to the weight in float32 and rounded once (`base_weight`)

Sums are in float32, because a small update added to bfloat16 weights is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.noise import Noise
from lora_lightning.distributed import assembled, full_tensor, local, own_rows, zeros_sharded_like
from lora_lightning.errors import AdapterStateError

Rule = Literal["outer_step", "figure_ema"]


class FactoredUpdate(nn.Module):
    """Folded low-rank updates, side by side; grows by the rank of each."""

    log_A: Tensor
    """(*lead, C, d_in)"""
    log_B: Tensor
    """(*lead, d_out, C)"""
    log_weight: Tensor
    """c, (C,)"""
    slow_weight: Tensor
    """Weights of the moving average S, (C,)."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        for name, size in {"log_A": (0, base.d_in), "log_B": (base.d_out, 0)}.items():
            self.register_buffer(name, base.zeros(*size))
        for name in ("log_weight", "slow_weight"):
            self.register_buffer(name, torch.zeros(0, dtype=base.adapter_dtype, device=base.device))

    def fold(self, A: Tensor, B: Tensor, blend: float, rule: Rule) -> None:
        """Add an update B A, for A (*lead, r, d_in) and B (*lead, d_out, r)."""
        new, older = self.log_weight.new_full((A.shape[-2],), blend), self.slow_weight
        self.log_A, self.log_B = torch.cat([self.log_A, A], dim=-2), torch.cat([self.log_B, B], dim=-1)
        self.slow_weight = torch.cat([older * (1 - blend if rule == "figure_ema" else 0), new])
        self.log_weight = torch.cat([self.log_weight, torch.zeros_like(new)]) + self.slow_weight

    def forget_average(self) -> None:
        """S = 0; D stays."""
        self.slow_weight.zero_()

    def compress(self, rank: int) -> tuple[float, float]:
        """Cut D to the nearest update of this rank, in place, and S to zero; nothing where it has no more columns.

        Returns:
            Frobenius norms of what is lost, and of D before.
        """
        if len(self.log_weight) <= rank:
            return 0.0, 0.0
        A, B = (factor.double() for factor in self.low_rank())
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.mT)
        U, sizes, V = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        root, dtype = sizes[..., :rank].sqrt(), self.log_A.dtype
        # laid out as they will be when they are loaded, so that a resumed run rounds alike
        self.log_A = (root[..., :, None] * (Q_A @ V[..., :rank, :].mT).mT).to(dtype).contiguous()
        self.log_B = ((Q_B @ U[..., :rank]) * root[..., None, :]).to(dtype).contiguous()
        self.log_weight, self.slow_weight = (self.log_weight.new_full((root.shape[-1],), c) for c in (1.0, 0.0))
        return float(torch.linalg.vector_norm(sizes[..., rank:])), float(torch.linalg.vector_norm(sizes))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + D x."""
        if not len(self.log_weight):  # nothing folded yet; a convolution cannot have no output channel
            return base(x)
        return add_low_rank(base, x, self.log_A, self.log_B, self.log_weight)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + D."""
        A, B = self.low_rank()
        return plus_product(weight, B.to(weight.dtype), A.to(weight.dtype))

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias, unchanged."""
        return bias

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A (C, d_in), B (d_out, C)) with D == B A."""
        return self.log_A, self.log_B * self.log_weight


class DenseUpdate(nn.Module):
    """A folded update of any form."""

    delta: Tensor
    """D, (d_out, d_in), in float32 at least; sharded where the weight is."""
    slow: Tensor
    """S of the rule "figure_ema", (d_out, d_in); there once it is needed."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.register_buffer("delta", base.zeros_like_weight())

    def fold(self, update: Tensor, blend: float, rule: Rule) -> None:
        """Add an update F, a full tensor (d_out, d_in)."""
        delta, own = local(self.delta), own_rows(update, self.delta)
        if rule == "outer_step":
            delta.add_(own, alpha=blend)
            return
        if not hasattr(self, "slow"):
            self.register_buffer("slow", zeros_sharded_like(self.delta, self.delta.dtype))
        delta.add_(local(self.slow).mul_(1 - blend).add_(own, alpha=blend))

    def forget_average(self) -> None:
        """S = 0; D stays."""
        if hasattr(self, "slow"):
            local(self.slow).zero_()

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + D, a full tensor."""
        return weight + full_tensor(self.delta).to(weight.dtype)


FoldedUpdate = FactoredUpdate | DenseUpdate
UPDATE_TENSORS = ("log_A", "log_B", "log_weight", "slow_weight", "delta", "slow")
"""Names of all buffers that a folded update may have."""


def update_like(base: BaseLayer, tensors: Mapping[str, Tensor]) -> FoldedUpdate | None:
    """An empty folded update that `tensors`, by name, fit into; None where they fit none."""
    update: FoldedUpdate = DenseUpdate(base) if "delta" in tensors else FactoredUpdate(base)
    if isinstance(update, FactoredUpdate) and tensors.keys() == {"log_A", "log_B", "log_weight", "slow_weight"}:
        columns = len(tensors["log_weight"])
        for name, size in {"log_A": (columns, base.d_in), "log_B": (base.d_out, columns)}.items():
            setattr(update, name, base.zeros(*size))
        update.log_weight, update.slow_weight = (update.log_weight.new_zeros(columns) for _ in range(2))
    if isinstance(update, DenseUpdate) and "slow" in tensors:
        update.register_buffer("slow", zeros_sharded_like(update.delta, update.delta.dtype))
    return update if fits(update, tensors) else None


def fits(update: FoldedUpdate | None, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `tensors` are those of `update`, by name and shape; none are those of None."""
    own = {} if update is None else update.state_dict()
    return own.keys() == tensors.keys() and all(own[name].shape == tensors[name].shape for name in own)


def factors_with(own: tuple[Tensor, Tensor] | None, folded: FoldedUpdate | None) -> tuple[Tensor, Tensor] | None:
    """(A (R, d_in), B (d_out, R)) of an adapter's `low_rank` and what it has folded; None where one has no factors."""
    if own is None or folded is None:
        return own
    if not isinstance(folded, FactoredUpdate):
        return None
    A, B = folded.low_rank()
    if not own[1].any():  # a stage that has just begun
        return A, B
    return torch.cat([A, own[0]], dim=-2), torch.cat([B, own[1]], dim=-1)


def fold(
    adapter: Adapter, folded: FoldedUpdate, wrapped: BaseLayer, blend: float, rule: Rule, noise: Noise | None
) -> None:
    """Add an adapter's update to what it has folded; all processes take part where it is sharded.

    Args:
        adapter: stays as it is.
        folded: changed in place.
        wrapped: the base that the adapter sees.
        blend: weight f of the update, in (0, 1].
        rule: how earlier updates go on.
        noise: what is folded with it of the noise on the weight; only a dense update can hold it.

    Raises:
        AdapterStateError: `folded` cannot hold the update or the noise, or the adapter changes the bias.
    """
    kind = type(adapter).__name__
    with assembled(adapter):
        if _changes_bias(adapter, wrapped.bias):
            raise AdapterStateError(f"{kind} changes the bias, which no folded update holds.")
        factors = adapter.low_rank()
        if isinstance(folded, FactoredUpdate):
            if factors is None or noise is not None:
                what = "noise" if factors else f"the update of {kind}"
                raise AdapterStateError(f"{what} has no factors to fold; give it a DenseUpdate.")
            folded.fold(*factors, blend, rule)
            return
        if factors is None:
            weight = wrapped.weight(wrapped.adapter_dtype)
            update = adapter.merged_weight(weight) - weight
        else:  # the difference of two weights would have lost digits of a small update
            update = factors[1] @ factors[0]
    folded.fold(update, blend, rule)
    if noise is not None:
        local(folded.delta).add_(noise.draw(folded.delta))


def _changes_bias(adapter: Adapter, bias: Tensor | None) -> bool:
    changed = adapter.merged_bias(bias)
    return bias is not None and changed is not None and changed is not bias and not torch.equal(changed.to(bias), bias)
