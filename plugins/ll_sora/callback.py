"""The gates of SoRA: their start, their mean, the operators that shrink them, and the callback that applies one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import softshrink

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weighted import Components, WeightedAdapter, write_normal
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS
from lora_lightning.distributed import local, whole
from lora_lightning.errors import SettingsError


def open_gates(adapter: WeightedAdapter, generator: torch.Generator) -> None:
    """Gates at N(0, 1); the pair, of which one side is zero, keeps its start."""
    write_normal(adapter.gate, 1.0, generator)


GATED = Components("shrunk", begin=open_gates)
"""A gate on each rank component."""


def mean_gate(adapters: Mapping[str, Adapter]) -> Tensor:
    """Mean |g| over all gates, differentiable."""
    gates = [whole(cast(WeightedAdapter, adapter).gate) for adapter in adapters.values()]
    return torch.cat([gate.flatten() for gate in gates]).abs().mean()


def shrunk(gate: Tensor, threshold: float, operator: str) -> Tensor:
    """`gate` (..., rank) after a proximal step.

    "soft" is sign(v) max(|v| - threshold, 0). "released" takes the threshold off what is larger, and then closes
    everything below it; what equals the threshold stays, as in the released code.
    """
    if operator == "soft":
        return softshrink(gate, threshold)
    nearer = torch.where(gate.abs() > threshold, gate - threshold * gate.sign(), gate)
    return torch.where(nearer.abs() < threshold, 0.0, nearer)


def strength(step: int, total: int | None, stages: int, first: float, last: float) -> float:
    """Strength at optimizer step `step`, from 1, of `total` in equal stages: on a line from the first to the last."""
    if stages == 1 or total is None:
        return last
    stage = min((step - 1) * stages // total, stages - 1)
    return first + (last - first) * stage / (stages - 1)


class ProximalStep(ScheduleCallback):
    """Shrinks the gates after each optimizer step by its own learning rate, before the next forward.

    Args:
        shrinkage: strength lambda.
        threshold: "rate" takes the gates' learning rate of the step times lambda, "constant" lambda itself.
        operator: "soft" or "released"; see `shrunk`.
        stages: equal parts of the run, of strengths on a line.
        first_shrinkage: strength of the first of several.

    Raises:
        SettingsError: stages in a run whose length nothing bounds.
        NoEffectError: no trainable adapter has such gates.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "weighted rank components that may be shrunk (SoRA)"

    def __init__(
        self,
        shrinkage: float,
        threshold: str = "rate",
        operator: str = "soft",
        stages: int = 1,
        first_shrinkage: float = 0.0,
    ) -> None:
        super().__init__()
        self.shrinkage, self.threshold, self.operator = shrinkage, threshold, operator
        self.stages, self.first_shrinkage = stages, first_shrinkage
        self._rates: dict[int, float] = {}
        self._open = 0.0

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters whose gates may be shrunk."""
        return isinstance(adapter, WeightedAdapter) and adapter.components.kind == "shrunk"

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse stages of a run without an end."""
        if self.stages > 1 and total is None:
            raise SettingsError(
                f"SoRA.stages is {self.stages}, but nothing bounds the steps they divide; set max_steps."
            )

    def on_gradients(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Keep the rates of this step: the scheduler moves on before the step has ended."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self._rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Shrink each gate; A and B stay as they are."""
        now = strength(step, self.total, self.stages, self.first_shrinkage, self.shrinkage)
        kept = []
        for adapter in adapters.values():
            gate = cast(WeightedAdapter, adapter).gate
            rate = self._rates.get(id(gate), 0.0) if self.threshold == "rate" else 1.0
            shard = local(gate.data)
            shard.copy_(shrunk(shard, rate * now, self.operator))
            kept.append(whole(gate.detach()).count_nonzero() / gate.numel())
        self._open = float(torch.stack(kept).mean())

    def metrics(self) -> Mapping[str, float]:
        """Fraction of gates that are open."""
        return {"open_gates": self._open}
