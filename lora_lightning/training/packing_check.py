"""PackingCheck: a model that lets packed examples see one another is refused before it learns from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lora_lightning.callbacks.step_counting import JUDGES, outside_step
from lora_lightning.distributed import reshard
from lora_lightning.errors import ModelError
from lora_lightning.injection.records import injected_root

TOLERANCE = {4: 1e-2, 2: 0.1}
"""Largest difference that passes, by bytes a number: rounding is far below it, an example that is seen far above."""


class PackingCheck(Callback):
    """Compares, on the first packed batch, the model's outputs for two examples packed into a row with those for each.

    Packed batches carry `position_ids` that start again and no `attention_mask`, which is how transformers is told.
    Models that ignore them (ALiBi, recurrent and state-space ones, and some others) give other outputs.

    Raises:
        ModelError: the model mixes the examples.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self) -> None:
        self.difference: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare once a run; outside autocast, in eval mode, so that no random number is drawn."""
        if self.difference is not None or not isinstance(batch, dict) or "position_ids" not in batch:
            return
        model: Any = injected_root(pl_module)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                rows = batch["input_ids"][:2]
                self.difference = outside_step(trainer, lambda: packing_difference(model, rows))
        finally:
            for module, mode in modes.items():
                module.training = mode
            reshard(model)


def packing_difference(model: Callable[..., Any], rows: Tensor) -> float:
    """How far packing moves a model's outputs, in standard deviations of an output.

    Each row is cut into halves: packed they follow one another in the row, else each is a row of its own.

    Raises:
        ModelError: further than rounding does.
    """
    half = rows.shape[1] // 2
    name = type(model).__name__
    if half < 2:
        return 0.0
    positions = torch.arange(half, device=rows.device).repeat(2).expand(len(rows), -1)
    try:
        packed = model(input_ids=rows[:, : 2 * half], position_ids=positions, use_cache=False).logits
        alone = model(input_ids=torch.cat([rows[:, :half], rows[:, half : 2 * half]]), use_cache=False).logits
    except TypeError as error:
        raise ModelError(f"data.packing is True; {name} cannot be told of packed examples ({error}).") from error
    expected = torch.cat(alone.chunk(2), dim=1)
    spread = expected.float().std().clamp_min(1e-12)
    difference = float((packed - expected).float().abs().max() / spread)
    if not difference <= TOLERANCE.get(packed.element_size(), 1e-2):
        raise ModelError(
            f"data.packing is True; {name} lets packed examples see one another, or counts positions through them: two "
            f"examples in one row give other outputs than alone, by {difference:.2g} standard deviations. "
            "Models that take no positions (ALiBi, recurrent, state-space) do so, and attention kernels that find "
            "packed examples in a batch of one row only. Set data.packing to false; data.group_by_length saves padding"
            " too."
        )
    return difference
