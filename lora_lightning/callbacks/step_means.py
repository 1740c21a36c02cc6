"""Means of what adapters sum while they train, over the micro-batches and processes of one optimizer step.

Sum and count come from forwards. A recomputed forward doubles both, so that the mean stays. Between two steps the sums
are empty; a save inside an accumulation window holds them, of each process its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.base import RunningSum
from lora_lightning.distributed import gather_objects, summed_over_all


class StepMeans:
    """The mean of one statistic of several adapters, taken once an optimizer step.

    Args:
        sums: what adapters sum, by name; the same names on every process.
        sizes: entries of each sum.
        device: where processes add up.
    """

    def __init__(self, sums: Mapping[str, RunningSum], sizes: Mapping[str, int], device: torch.device | str) -> None:
        self.sums, self.sizes, self.device = dict(sums), sizes, device

    def take(self) -> dict[str, Tensor]:
        """Means in float32 by name, after which the sums are empty; names without an observation are left out.

        One collective, which every process has to reach.
        """
        parts = []
        for name, running in self.sums.items():
            count, mean = running.count, running.take()
            part = torch.zeros(self.sizes[name] + 1, device=self.device)
            if mean is not None:
                part[:-1], part[-1] = mean.float() * count, count
            parts.append(part)
        totals = summed_over_all(torch.cat(parts)).split([len(part) for part in parts])
        return {name: t[:-1] / t[-1] for name, t in zip(self.sums, totals, strict=True) if t[-1] > 0}

    def forget(self) -> None:
        """Empty the sums."""
        for running in self.sums.values():
            running.take()

    def state(self) -> list[dict[str, Any]]:
        """What each process has summed of a step that is not over; all processes take part."""
        mine = {name: (s.sum.cpu(), s.count) for name, s in self.sums.items() if s.sum is not None}
        return gather_objects(mine)

    def load(self, state: list[dict[str, Any]], rank: int) -> None:
        """Go on with the sums that process `rank` had."""
        self.forget()
        for name, (total, count) in state[rank % len(state)].items():
            self.sums[name].add(total.to(self.device), count)
