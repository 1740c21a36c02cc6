"""Reselection: once on the way, entries that have grown beyond the threshold stop training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from lightning.pytorch.callbacks import Callback

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weight_entries import EntriesAdapter
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, resolve_step
from lora_lightning.distributed import gather
from lora_lightning.errors import SettingsError
from lora_lightning.optim.state import clear


class Reselection(ScheduleCallback):
    """After one optimizer step, chooses again among the entries that train; the optimizer begins anew with them.

    Args:
        moment: up to 1 a fraction of the run's optimizer steps, from 2 on a step number.

    Raises:
        SettingsError: a moment that is not inside the run.
        NoEffectError: no trainable adapter trains entries of a weight.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "entries of a weight (SaRA)"

    def __init__(self, moment: float) -> None:
        super().__init__()
        self.moment = moment
        self._step = 0
        self._live = 1.0

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters that train entries of a weight."""
        return isinstance(adapter, EntriesAdapter)

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a moment at the end of the run or after it."""
        step = resolve_step(self.moment, total, "SaRA.reselect")
        if step < 1 or (total is not None and step >= total):
            raise SettingsError(
                f"SaRA.reselect is {self.moment}, step {step} of a run of {total}; it must lie inside, such as 0.5, or "
                "be 0 for never."
            )

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the moment."""
        self._step = resolve_step(self.moment, total, "SaRA.reselect")
        self._count(adapters)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Choose, where it is time."""
        if step != self._step:
            return
        own = [cast(EntriesAdapter, adapter) for adapter in adapters.values()]
        for adapter, values in zip(own, gather([adapter.values for adapter in own]), strict=True):
            adapter.select_again(values)
        for optimizer in self.trainer.optimizers:
            clear(optimizer, [adapter.values for adapter in own])
        self._count(adapters)

    def _count(self, adapters: Mapping[str, Adapter]) -> None:
        masks = [cast(EntriesAdapter, adapter).live for adapter in adapters.values()]
        self._live = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def finished(self, step: int) -> bool:
        """Whether it has chosen."""
        return step >= self._step

    def metrics(self) -> Mapping[str, float]:
        """Fraction of the entries that train still."""
        return {"live_entries": self._live}
