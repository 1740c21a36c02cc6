"""Meters: rate, gradient norm, tokens a second and share of padding, in every logger."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.callbacks.step_counting import JUDGES, StepCallback, inside_window, logs_at
from lora_lightning.distributed import local, summed
from lora_lightning.injection.records import injected_root


class Meters(StepCallback):
    """Logs how fast a run learns and computes, where the trainer logs training numbers.

    lr: the rate of the step; lr_GROUP for groups of the optimizer with another full rate than the first. grad_norm: the
    2-norm of all gradients of the step, before they are clipped. tokens_per_second: tokens that the model read, of
    all processes, padding left out; of an encoder-decoder those that it wrote too. padding: the fraction of the places
    of batches that holds none. Batches without tokens are counted as examples_per_second. Validations do not count.

    Works in any Lightning project; of several optimizers each has a norm, grad_norm_NUMBER. Nothing is read from the
    device but at these steps. Under DeepSpeed, which keeps gradients to itself, there is no norm.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, Tensor | float] = {}
        self._counts: tuple[int, Tensor | int, int] = (0, 0, 0)
        self._decodes = False
        self._since = self._left_out = self._validation = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        config = getattr(injected_root(pl_module), "config", None)
        self._decodes = bool(getattr(config, "is_encoder_decoder", False))
        self._begin()

    def leave_out(self, seconds: float) -> None:
        """Take time of something that is no training from the window."""
        self._left_out += seconds

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._validation = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it go on."""
        self.leave_out(time.monotonic() - self._validation)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Rates and norm of a step that will be logged."""
        step = trainer.global_step + 1
        if inside_window(trainer) or not (step == 1 or logs_at(trainer, step)):
            return
        self._found |= rates(trainer.optimizers)
        norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])
        if norm is not None:
            number = next((n for n, one in enumerate(trainer.optimizers) if one is optimizer), 0)
            self._found["grad_norm" if len(trainer.optimizers) == 1 else f"grad_norm_{number}"] = norm

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch, before the step that it ends."""
        counts = token_counts(batch, self._decodes)
        if counts is not None:
            examples, tokens, places = self._counts
            self._counts = (examples + counts[0], tokens + counts[1], places + counts[2])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Log."""
        if logs_at(trainer, step):
            self._measure(trainer)
        for name, value in self._found.items():
            pl_module.log(name, value)
        self._found = {}

    def _measure(self, trainer: Trainer) -> None:
        seconds = time.monotonic() - self._since - self._left_out
        counts = torch.tensor([float(count) for count in self._counts], device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        examples, tokens, places = counts.tolist()
        if places:
            self._found["padding"] = 1 - tokens / places
        if examples and seconds > 0:
            name, count = ("tokens_per_second", tokens) if places else ("examples_per_second", examples)
            self._found[name] = count / seconds
        self._begin()

    def _begin(self) -> None:
        self._counts, self._since, self._left_out = (0, 0, 0), time.monotonic(), 0.0


def rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Rates as they are now: `lr` of the first group, and `lr_GROUP` of groups with another full rate."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full = [group.get("initial_lr", group["lr"]) for group in groups]
    found = {"lr": float(groups[0]["lr"])} if groups else {}
    for number, group in enumerate(groups):
        if full[number] != full[0]:
            name = f"lr_{group.get('name', number)}"
            found[name if name not in found else f"{name}_{number}"] = float(group["lr"])
    return found


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """The 2-norm of the gradients; None where there are none. Of shards, all processes take part and get the whole."""
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    if not grads:
        return None
    shards = [grad for grad in grads if isinstance(grad, DTensor)]
    rest = [grad for grad in grads if not isinstance(grad, DTensor)]
    square = torch.nn.utils.get_total_norm(rest).float().square()
    if shards:
        own = torch.nn.utils.get_total_norm([local(shard) for shard in shards]).float().square()
        square = square + summed(own, shards).to(square.device if rest else own.device)
    return square.sqrt()


def token_counts(batch: Any, decodes: bool = False) -> tuple[int, Tensor | int, int] | None:
    """Examples, tokens and places for tokens of a batch; None where it holds no rows. Nothing is read off a device.

    Args:
        batch: as a training step gets it.
        decodes: whether tokens that carry labels are read as well, by a decoder.
    """
    if not isinstance(batch, Mapping):
        first = batch[0] if isinstance(batch, list | tuple) and batch else batch
        return (len(first), 0, 0) if isinstance(first, Tensor) and first.dim() else None
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        rows = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
        return None if rows is None else (len(rows), 0, 0)
    tokens, places = _read(batch, ids), ids.numel()
    labels = batch.get("labels")
    if decodes and isinstance(labels, Tensor) and labels.dim() == 2:
        tokens, places = tokens + (labels >= 0).sum(), places + labels.numel()
    return len(ids), tokens, places


def _read(batch: Mapping[str, Any], ids: Tensor) -> Tensor | int:
    """Tokens that are no padding: by the mask, or in packed rows by where positions end."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.sum()
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        # behind its last example a row has positions of 0; one token alone at its end would look the same
        return (positions.flip(-1).cummax(-1).values > 0).sum()
    return ids.numel()
