"""Walk: measures the line between two adapter folders on a run's validation data, inside `Trainer.validate`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ll_rebasin.barrier import SPACES, Barrier, linear_barrier
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.injection.records import injected_root
from lora_lightning.storage.load import load_adapter


class Walk(Callback):
    """Loads both adapters, and measures the loss of an AdapterModule along the line, in every space that it has.

    Args:
        first: adapter folder at t = 0.
        second: adapter folder at t = 1.
        points: places on the line.
        batches: validation batches at each; None takes all.

    Attributes:
        found: a barrier for each space.
    """

    def __init__(self, first: Path, second: Path, points: int, batches: int | None) -> None:
        self.folders, self.points, self.batches = {"a": first, "b": second}, points, batches
        self.found: list[Barrier] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Walk."""
        module: Any = pl_module
        root = injected_root(module)
        for name, folder in self.folders.items():
            load_adapter(root, folder, name)
        loader = module.trainer.datamodule.val_dataloader()

        def loss() -> float:
            batches = itertools.islice(loader, self.batches)
            values = module.measure_batches(trainer.strategy.batch_to_device(batch) for batch in batches)
            return float(values["loss"])

        layers = [layer for layer in root.modules() if isinstance(layer, AdaptedLayer)]
        pairs = [layer.low_rank(name) for layer in layers for name in "ab" if name in layer.adapters]
        spaces = SPACES if all(pair is not None for pair in pairs) else SPACES[:1]
        with trainer.precision_plugin.forward_context():
            self.found = [linear_barrier(root, loss, "a", "b", self.points, space) for space in spaces]
