"""RouterStatistics: how evenly routers use their experts, logged once per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ll_riemannian_moe.functional import load_statistics
from lora_lightning.adapters.base import RunningSum
from lora_lightning.callbacks.step_counting import JUDGES, StepCallback, announce
from lora_lightning.errors import NoEffectError
from lora_lightning.injection.records import trainable_adapters

STATISTIC = "load"


class RouterStatistics(StepCallback):
    """Logs the load of the experts since the last optimizer step, over all micro-batches and processes.

    `router_max_over_mean` is 1 at balance, `router_entropy` too (entropy of the assignments over log E), `router_dead`
    is the fraction of experts without a token; each is the mean over layers.

    Raises:
        NoEffectError: no trainable adapter counts a load.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self) -> None:
        super().__init__()
        self._statistics: dict[str, RunningSum] = {}
        self._experts: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers."""
        super().on_train_start(trainer, pl_module)
        found = trainable_adapters(pl_module)
        routed = {path: adapter for path, adapter in found.items() if STATISTIC in adapter.statistics()}
        if not routed:
            raise NoEffectError(
                f"{type(self).__name__} found nothing to act on: it needs trainable adapters with a router "
                f'(statistics() has "{STATISTIC}"); the model has {len(found)} trainable adapters, none with one.'
            )
        announce(trainer, self, "acts on", "adapter", [path.rpartition(".adapters.")[0] for path in routed])
        self._statistics = {path: adapter.statistics()[STATISTIC] for path, adapter in routed.items()}
        self._experts = {path: adapter.factor_pairs()[0].lora_A.shape[0] for path, adapter in routed.items()}

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Log after a step, and empty the statistics."""
        loads = [load for load in self._take(trainer, pl_module.device) if load.sum() > 0]
        if loads:
            pl_module.log_dict({f"router_{name}": value for name, value in _mean_statistics(loads).items()})

    def _take(self, trainer: Trainer, device: torch.device) -> list[Tensor]:
        """Tokens that each expert of each layer received, over all processes; one collective, reached by all."""
        totals = []
        for path, running_sum in self._statistics.items():
            count = running_sum.count
            mean = running_sum.take()
            totals.append(torch.zeros(self._experts[path], device=device) if mean is None else mean.float() * count)
        flat = torch.cat(totals)
        if trainer.world_size > 1:
            flat = cast(Tensor, trainer.strategy.reduce(flat, reduce_op="sum"))
        return list(flat.split(list(self._experts.values())))


def _mean_statistics(loads: list[Tensor]) -> Mapping[str, Tensor]:
    """Each statistic's mean over layers."""
    layers = [load_statistics(load) for load in loads]
    return {name: torch.stack([layer[name] for layer in layers]).mean() for name in layers[0]}
