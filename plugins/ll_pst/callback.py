"""PSTSchedule: the fraction of zeros rises along a cubic ramp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from lightning.pytorch.callbacks import Callback

from ll_pst.adapter import PSTAdapter
from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.keep_masks import kept_density
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, resolve_ramp


class PSTSchedule(ScheduleCallback):
    """Tells adapters after each optimizer step how many entries of their weight are zero in the next.

    v = 0 until `start`, then v_f (1 - (1 - (t - start) / (end - start))^3), and v_f from `end` on, t the step. What an
    adapter has pruned in an earlier run stays pruned.

    Args:
        sparsity: v_f, the final fraction of zeros.
        start: when pruning starts: up to 1 a fraction of the run's optimizer steps, from 2 on a step number.
        end: when the final fraction is reached, in the same unit.

    Raises:
        SettingsError: a schedule that does not fit the run.
        NoEffectError: no trainable adapter prunes its weight.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "a pruned weight (PST)"
    writes_values: ClassVar[bool] = False

    def __init__(self, sparsity: float, start: float, end: float) -> None:
        super().__init__()
        self.sparsity, self.start, self.end = sparsity, start, end
        self._ramp = (0, 0)
        self._current = 0.0

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters that prune their weight."""
        return isinstance(adapter, PSTAdapter)

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a ramp that does not fit."""
        resolve_ramp(self.start, self.end, total, "PST")

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the ramp."""
        self._ramp = resolve_ramp(self.start, self.end, total, "PST")

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Set the fraction of zeros of the next step."""
        self._current = 1 - kept_density(step, *self._ramp, 1 - self.sparsity)
        for adapter in adapters.values():
            cast(PSTAdapter, adapter).prune(self._current)

    def finished(self, step: int) -> bool:
        """Whether the final fraction is reached."""
        return step >= self._ramp[1]

    def metrics(self) -> Mapping[str, float]:
        """Fraction of zeros."""
        return {"sparsity": self._current}
