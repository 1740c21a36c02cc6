"""WindowMeans: means over the last optimizer steps of what adapters sum, kept in a buffer of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter, write_values
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS
from lora_lightning.callbacks.step_means import StepMeans
from lora_lightning.models.paths import plain


class WindowMeans(ScheduleCallback):
    """Writes, after each step, the mean of a statistic over the last steps into the adapter's buffer of that name.

    A step's value is the mean over its micro-batches and processes; a step without an observation has none.

    Args:
        name: of the statistic (`Adapter.statistics`), and of the buffer, which is of its size.
        window: how many steps back the mean reaches.

    Raises:
        NoEffectError: no trainable adapter sums it.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "a statistic with a buffer for its mean"

    def __init__(self, name: str, window: int) -> None:
        super().__init__()
        self.name, self.window = name, window
        self._kept: dict[str, deque[Tensor]] = {}
        self._means: StepMeans | None = None
        self._saved: dict[str, Any] = {}

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters that sum the statistic."""
        return self.name in adapter.statistics()

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Begin with an empty window, or with the checkpoint's."""
        sums = {plain(path): adapter.statistics()[self.name] for path, adapter in adapters.items()}
        sizes = {plain(path): adapter.get_buffer(self.name).numel() for path, adapter in adapters.items()}
        self._means = StepMeans(sums, sizes, self.module.device)
        self._means.forget()
        kept = self._saved.get("kept", {})
        self._kept = {path: deque(kept[path].unbind() if path in kept else (), self.window) for path in sums}
        if self._saved:
            self._means.load(self._saved["open"], self.trainer.global_rank)
        self._saved = {}

    def on_skipped(self, step: int) -> None:
        """Forget what was observed for the step."""
        if self._means is not None:
            self._means.forget()

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Take the step's means, and write those of the window."""
        assert self._means is not None
        found = self._means.take()
        for path, adapter in adapters.items():
            kept = self._kept[plain(path)]
            if plain(path) in found:
                kept.append(found[plain(path)].cpu())
                write_values(adapter.get_buffer(self.name), torch.stack([*kept]).mean(0))

    def state_dict(self) -> dict[str, Any]:
        """The window, and what has been summed of a step that is not over."""
        kept = {path: torch.stack([*values]) for path, values in self._kept.items() if values}
        return super().state_dict() | {"kept": kept, "open": [] if self._means is None else self._means.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the window until the adapters are known."""
        super().load_state_dict(state_dict)
        self._saved = {name: state_dict[name] for name in ("kept", "open")}
