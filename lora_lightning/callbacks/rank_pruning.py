"""RankPruning: rank components of least norm go, layer by layer, along a cubic ramp."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.pytorch.callbacks import Callback

from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.keep_masks import keep_top, kept_density
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, resolve_ramp
from lora_lightning.distributed import assembled, local
from lora_lightning.errors import SettingsError, check


class RankPruning(ScheduleCallback):
    """Removes rank components of adapters that answer `rank_mask` and `rank_scores()`.

    A removed component is multiplied by zero in the forward pass and has no gradient; it does not return. Parameters
    keep their shapes; the smaller factors are cut when the adapter is exported.

    Args:
        final_rank: components left in each adapter at the end.
        start: when pruning starts; up to 1 a fraction of all optimizer steps, from 2 on a step number.
        end: when the final rank is reached, in the same unit.
        every_n_steps: steps between two removals.

    Raises:
        SettingsError: a value outside its rule, or a schedule that does not fit the run.
        NoEffectError: no trainable adapter has a rank mask.
    """

    phase: ClassVar[int] = MASKS
    writes_values: ClassVar[bool] = False
    requires: ClassVar[str] = "a rank mask (rank_mask, rank_scores())"

    def __init__(self, final_rank: int, start: float = 0.1, end: float = 0.8, every_n_steps: int = 1) -> None:
        super().__init__()
        self.final_rank, self.start, self.end, self.every_n_steps = final_rank, start, end, every_n_steps
        check(final_rank >= 1, self, "final_rank", "it must be at least 1.")
        check(every_n_steps >= 1, self, "every_n_steps", "it must be at least 1.")
        self.start_step = self.end_step = 0
        self._rank = 0.0

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters with a rank mask."""
        return adapter.rank_mask is not None

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a ramp that does not fit."""
        resolve_ramp(self.start, self.end, total, type(self).__name__)

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the ramp; refuse a final rank above any adapter's."""
        self.start_step, self.end_step = resolve_ramp(self.start, self.end, total, type(self).__name__)
        for path, adapter in adapters.items():
            assert adapter.rank_mask is not None
            if len(adapter.rank_mask) < self.final_rank:
                raise SettingsError(
                    f"RankPruning.final_rank is {self.final_rank}; {path} has rank {len(adapter.rank_mask)}, "
                    "so it must be at most that."
                )

        if not self.resumed:
            self._start_anew(adapters)

    def _start_anew(self, adapters: Mapping[str, Adapter]) -> None:
        """Let components that an earlier run has removed compete again, from zero: nothing is computed otherwise."""
        removed = 0
        for adapter in adapters.values():
            mask = adapter.rank_mask
            if mask is None or bool(mask.all()):
                continue
            removed += int((~mask).sum())
            for pair in adapter.factor_pairs():
                local(pair.lora_B.data).mul_(mask.to(pair.lora_B.dtype))
            mask.fill_(True)
        if removed and self.trainer.is_global_zero:
            print(
                f"{type(self).__name__}: an earlier run has removed {removed:,} rank components; they compete again, "
                "and the schedule begins anew"
            )

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Keep the components of largest norm."""
        if step % self.every_n_steps == 0 or step >= self.end_step:
            with assembled(*adapters.values()):
                found = [(adapter.rank_mask, adapter.rank_scores()) for adapter in adapters.values()]
            for mask, scores in found:
                assert mask is not None
                assert scores is not None
                density = kept_density(step, self.start_step, self.end_step, self.final_rank / len(mask))
                mask.copy_(keep_top(scores.masked_fill(~mask, -1.0), math.ceil(density * len(mask) - 1e-9)))
        masks = [adapter.rank_mask for adapter in adapters.values() if adapter.rank_mask is not None]
        self._rank = sum(int(mask.sum()) for mask in masks) / len(masks)

    def finished(self, step: int) -> bool:
        """Whether the ramp is over."""
        return step >= self.end_step

    def metrics(self) -> Mapping[str, float]:
        """Mean rank left."""
        return {"rank": self._rank}
