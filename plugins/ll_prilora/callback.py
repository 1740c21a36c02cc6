"""InputNormPruning: entries of A that matter least, by their size and the norm of their input, become zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.input_squares import SQUARES
from lora_lightning.callbacks.keep_masks import keep_top
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS
from lora_lightning.callbacks.step_means import StepMeans
from lora_lightning.distributed import gather, local, own_rows
from lora_lightning.errors import ResumeError
from lora_lightning.models.paths import plain


class InputNormPruning(ScheduleCallback):
    """Sets the entries of A of least importance |A_ij| n_j to zero.

    n_j is a moving average over steps of the root mean square of input j, over all micro-batches and processes. A zero
    trains on; moments of the optimizer stay.

    Args:
        sparsity: fraction of entries that an event sets to zero.
        every_n_steps: optimizer steps between two events.
        beta: memory of the average.
        scope: whether entries compete within each row of A or in all of it.

    Raises:
        NoEffectError: no trainable adapter sums the squares of its inputs.
        ResumeError: the checkpoint holds no average for an adapter.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = f'the squares of its inputs (statistics() has "{SQUARES}")'

    def __init__(self, sparsity: float, every_n_steps: int, beta: float, scope: Literal["row", "matrix"]) -> None:
        super().__init__()
        self.sparsity, self.every_n_steps, self.beta, self.scope = sparsity, every_n_steps, beta, scope
        self.norms: dict[str, Tensor] = {}
        """Averaged norms by adapter, (d_in,) in float32, equal on all processes."""
        self._means: StepMeans | None = None
        self._saved: dict[str, Any] | None = None

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters that sum the squares of their inputs."""
        return SQUARES in adapter.statistics()

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Begin at zero, or where the checkpoint was."""
        sums = {plain(path): adapter.statistics()[SQUARES] for path, adapter in adapters.items()}
        widths = {plain(path): adapter.factor_pairs()[0].lora_A.shape[-1] for path, adapter in adapters.items()}
        device = self.module.device  # factors may wait on the CPU
        self.norms = {path: torch.zeros(width, device=device) for path, width in widths.items()}
        self._means = StepMeans(sums, widths, device)
        self._means.forget()
        if self._saved is None:
            return
        for path, norms in self.norms.items():
            if path not in self._saved["norms"]:
                raise ResumeError(f"the checkpoint holds no averaged norms of the inputs of {path}.")
            norms.copy_(self._saved["norms"][path])
        self._means.load(self._saved["window"], self.trainer.global_rank)
        self._saved = None

    def on_skipped(self, step: int) -> None:
        """Forget the inputs of the step."""
        if self._means is not None:
            self._means.forget()

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Average the norms, and prune where it is time."""
        assert self._means is not None
        for path, squares in self._means.take().items():
            self.norms[path].lerp_(squares.sqrt(), 1 - self.beta)
        if step % self.every_n_steps == 0:
            self._prune([adapter.factor_pairs()[0].lora_A for adapter in adapters.values()])

    def _prune(self, factors: list[Tensor]) -> None:
        """Zero the least important entries; of a layer that no input has reached, none."""
        for A, full, norms in zip(factors, gather(factors), self.norms.values(), strict=True):
            if norms.any():
                importance = full.float().abs() * norms.to(full.device)
                if self.scope == "matrix":
                    importance = importance.flatten()
                keep = importance.shape[-1] - math.floor(self.sparsity * importance.shape[-1] + 1e-9)
                mask = keep_top(importance, keep).view(full.shape)
                local(A.data).mul_(own_rows(mask.to(A.dtype), A))

    def state_dict(self) -> dict[str, Any]:
        """The averages, and what has been summed of a step that is not over."""
        window = [] if self._means is None else self._means.state()
        return super().state_dict() | {"norms": dict(self.norms), "window": window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages until the adapters are known."""
        super().load_state_dict(state_dict)
        self._saved = {name: state_dict[name] for name in ("norms", "window")}
