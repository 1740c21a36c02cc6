"""Methods that break the contract, each in one thing, and the contract of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, FactorPair, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.methods import Method
from lora_lightning.testing import MethodContract


class Pair(Adapter):
    """A correct low-rank adapter of plain torch, for the wrong ones to differ from in one thing."""

    additive = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(2, base.d_in, dtype=base.adapter_dtype))
        self.B = nn.Parameter(torch.zeros(base.d_out, 2, dtype=base.adapter_dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A, self.B, 2.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * self.B.to(weight.dtype) @ self.A.to(weight.dtype)

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.randn(self.A.shape, generator=generator))
        write_values(self.B, torch.zeros(self.B.shape))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.A.detach(), 2.0 * self.B.detach()

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        return (FactorPair("", self.A, self.B, 2.0),)


class ForgetsTheScaleInTheMerge(Pair):
    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


class ForgetsTheScaleInLowRank(Pair):
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.A.detach(), self.B.detach()


class StartsElsewhere(Pair):
    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.randn(self.A.shape, generator=generator))
        write_values(self.B, torch.ones(self.B.shape))


class DrawsGlobally(Pair):
    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.randn(self.A.shape))
        write_values(self.B, torch.zeros(self.B.shape))


class ReplacesItsParameter(Pair):
    def reset(self, generator: torch.Generator) -> None:
        self.A = nn.Parameter(torch.randn(self.A.shape, generator=generator, dtype=self.A.dtype))
        write_values(self.B, torch.zeros(self.B.shape))


class HidesState(Pair):
    def reset(self, generator: torch.Generator) -> None:
        Pair.reset(self, generator)
        self.hidden = torch.rand((), generator=generator)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A, self.B, 2.0) * (1 + self.B.sum() * self.hidden * self.A.sum())


class NeverUses(Pair):
    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.idle_weight = nn.Parameter(torch.zeros(3, dtype=base.adapter_dtype))


class NotAFunctionOfTheProduct(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A * self.A, self.B, 2.0)


class ScaledRows(Adapter):
    """W' = diag(1 + m) W, which says that it is additive and is not."""

    additive = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(torch.zeros(base.d_out, dtype=base.adapter_dtype))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        y = base(x)
        product = y if base.bias is None else y - base.per_output(base.bias)
        return y + (base.per_output(self.magnitude) * product).to(y.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.magnitude.to(weight.dtype))[:, None]

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.magnitude, torch.zeros(self.magnitude.shape))


class LeavesTheDtype(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base(x) + 2.0 * x.to(self.A.dtype) @ self.A.T @ self.B.T


class BreaksTheGraph(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        torch._dynamo.graph_break()
        return add_low_rank(base, x, self.A, self.B, 2.0)


class MisshapenMask(Pair):
    def masks(self) -> Any:
        from lora_lightning.adapters.base import EntryMask

        return (EntryMask(self.A, torch.ones(2, dtype=torch.bool), 1, "zero"),)


class SharesAFactor(Pair):
    """Its layers share one trained factor, which no `link` tells of."""

    one: ClassVar[dict[tuple[int, torch.dtype], nn.Parameter]] = {}

    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.B = nn.Parameter(base.zeros(base.d_out, 2))
        self.A = self.one.setdefault((base.d_in, base.adapter_dtype), nn.Parameter(base.zeros(2, base.d_in)))

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.A, torch.rand(self.A.shape, generator=generator, device=generator.device))
        write_values(self.B, torch.zeros(self.B.shape, device="cpu"))


class DrawsOnTheDefaultDevice(Pair):
    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.A = nn.Parameter(base.zeros(2, base.d_in))


class SharesAGain(Pair):
    """The same for rank weights, which layers of all widths share."""

    one: ClassVar[dict[torch.dtype, nn.Parameter]] = {}

    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.gain = self.one.setdefault(base.adapter_dtype, nn.Parameter(base.zeros(2) + 1))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A, self.B, self.gain)


class ScoresWithoutAMask(Pair):
    def rank_scores(self) -> Tensor | None:
        return self.A.square().sum(-1)


class TrainsInHalf(Pair):
    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base)
        self.A = nn.Parameter(self.A.detach().bfloat16())

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.A.to(self.B.dtype), self.B, 2.0)


class WritesIntoTheBase(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        if self.training:
            base.module.weight.data.add_(0.01)
        return add_low_rank(base, x, self.A, self.B, 2.0)


class MergesInPlace(Pair):
    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight.add_(2.0 * self.B.detach().to(weight.dtype) @ self.A.detach().to(weight.dtype))


class CountsItsCalls(Pair):
    """A call changes what the next one computes."""

    calls = 0

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        self.calls += 1
        return add_low_rank(base, x, self.A, self.B, 2.0 * self.calls)


class MixesRows(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x - x.mean(), self.A, self.B, 2.0)


class IgnoresItsFactors(Pair):
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base(x)


class LowRankKeepsTheGraph(Pair):
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.A, 2.0 * self.B


class SaysItCannotMerge(Pair):
    mergeable = False


@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """Builds what it is told to."""

    kind: ClassVar[type[Adapter]] = Pair

    def build(self, base: BaseLayer) -> Adapter:
        return self.kind(base)  # type: ignore[call-arg]


def contract_of(adapter: type[Adapter], **changes: Any) -> MethodContract:
    method_class = type("Broken", (Broken,), {"kind": adapter, "__doc__": "x", "__module__": __name__, **changes})
    return type("TestBroken", (MethodContract,), {"method": method_class()})()


def check_breaks(adapter: type[Adapter], test: str, says: str, **arguments: Any) -> None:
    """The correct adapter passes a test of the contract, and this one fails it, with `says` in the message."""
    getattr(contract_of(Pair), test)(**arguments)
    with pytest.raises((AssertionError, RuntimeError), match=f"(?m){says}"):  # pytest may show the values behind it
        getattr(contract_of(adapter), test)(**arguments)
