"""Noise on a frozen weight, drawn from a seed, for the time of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.distributed import own_rows
from lora_lightning.seeds import generator


@dataclass(frozen=True)
class Noise:
    """Uniform noise on a weight, a function of (seed, stage, path): never stored, drawn again where it is needed.

    Entries lie in [-scale / 2, scale / 2].
    """

    seed: int
    stage: int
    path: str
    scale: float

    def values(self, shape: Sequence[int]) -> Tensor:
        """Numbers of U[-1/2, 1/2] for all entries, float32 on the CPU; a generator gives them one after another."""
        drawn = generator(self.seed, "noise", self.stage, self.path)
        return torch.rand(tuple(shape), generator=drawn, device=drawn.device).sub_(0.5)

    def draw(self, like: Tensor, dtype: torch.dtype | None = None, values: Tensor | None = None) -> Tensor:
        """The noise for what this process holds of `like`; drawn for the full tensor, so that an entry's is the same.

        Args:
            like: the weight, (d_out, d_in).
            dtype: of the noise; the weight's by default.
            values: what `values` gives, where it has been called already.
        """
        values = self.values(like.shape) if values is None else values
        return self.scale * own_rows(values, like).to(like.device, dtype or like.dtype)
