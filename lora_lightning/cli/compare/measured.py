"""Measured: what a comparison keeps of each run, as files in its folder."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lora_lightning.callbacks.step_counting import REPORTS, inside_window, outside_step
from lora_lightning.distributed import reshard
from lora_lightning.injection.records import injected_root
from lora_lightning.storage.atomic import write_atomically, write_json
from lora_lightning.training.linear_baseline import validation_batches

POINTS = "points.jsonl"
"""A line of JSON for each validation."""
ROWS = "rows.npz"
"""Arrays `sums` and `counts` over validation rows, see `Task.score_rows`."""
MEASURED = "measured.json"
"""Written last: what the run cost."""
WARM = 3
"""Steps that are not timed, since the first ones take longer."""


class Measured(Callback):
    """Writes validation values as they come, and at the end what each validation row adds, time and memory.

    Args:
        folder: the run folder.
        keep_rows: whether validation rows are scored one by one.
    """

    phase: ClassVar[int] = REPORTS + 1

    def __init__(self, folder: Path, keep_rows: bool = True) -> None:
        super().__init__()
        self.folder, self.keep_rows = folder, keep_rows
        self._steps: list[float] = []
        self._began = self._first = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; what is measured before training has been."""
        self._first = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step."""
        if not self._began:
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop it where a step ends."""
        if not inside_window(trainer):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._steps.append(time.perf_counter() - self._began)
            self._began = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a line."""
        self._began = 0.0
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = {k.removeprefix("val_"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        with (self.folder / POINTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": trainer.global_step, "values": values}) + "\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score rows, and write what the run cost; after all others, with the state that was saved, on its device."""
        if self.keep_rows:
            self._write_rows(trainer, pl_module)
        if trainer.is_global_zero:
            steps = self._steps[WARM:] or self._steps
            write_json(
                self.folder / MEASURED,
                {
                    "step_seconds": statistics.median(steps) if steps else None,
                    "steps": trainer.global_step,
                    "seconds": time.monotonic() - self._first,
                    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
                    "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                },
            )

    def _write_rows(self, trainer: Trainer, module: LightningModule) -> None:
        scored = outside_step(trainer, lambda: self._scores(trainer, module))
        reshard(module)
        if scored is not None and trainer.is_global_zero:
            sums, counts = scored
            write_atomically(self.folder / ROWS, lambda file: np.savez_compressed(file, sums=sums, counts=counts))

    @torch.no_grad()
    def _scores(self, trainer: Trainer, module: LightningModule) -> tuple[Any, Any] | None:
        """Sums and counts of all validation rows; None where the metric is no mean over rows, or rows are shared."""
        task, model = cast(Any, module).task, cast(Any, injected_root(module))
        if trainer.world_size > 1 or not trainer.num_val_batches:
            return None
        was, found = model.training, []
        model.eval()
        try:
            with trainer.precision_plugin.forward_context():
                for batch in validation_batches(trainer):
                    scores = task.score_rows(task.logits(model, batch), batch)
                    if scores is None:
                        return None
                    found.append([part.float().cpu().numpy() for part in scores])
        finally:
            model.train(was)
        return np.concatenate([sums for sums, _ in found]), np.concatenate([counts for _, counts in found])


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes that `ru_maxrss` counts by."""
