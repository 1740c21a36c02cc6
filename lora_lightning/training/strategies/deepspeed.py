"""DeepSpeed: ZeRO stage 2, what trains in float32, with checkpoints that hold the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, cast

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.errors import ResumeError, SettingsError
from lora_lightning.training.trainer_checkpoints import read_by_all


class _Autocast(DeepSpeedPrecision):
    """Mixed precision by autocast, as under other strategies, which leaves what trains and the loss as they are."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast where precision is mixed."""
        mixed = self.precision == "bf16-mixed"
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=mixed)

    def convert_input(self, data: Any) -> Any:
        """The batch, cast under `bf16-true` alone."""
        return super().convert_input(data) if self.precision == "bf16-true" else data

    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As DeepSpeed does it, which would divide once more by the batches of a window."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO stage 2 of DeepSpeed, which has to be installed: gradients and optimizer states sharded. It needs GPUs.

    Checkpoints hold the adapter and not the optimizer's state, which lies in DeepSpeed: a run is not resumed from them.
    Gradients lie there as well, and copies of what trains: what reads or writes them is refused.

    Args:
        offload_optimizer: keep optimizer states in the CPU's memory.

    Raises:
        SettingsError: DeepSpeed is not installed.
    """

    hides_gradients = True

    def __init__(self, offload_optimizer: bool = False) -> None:
        if find_spec("deepspeed") is None:
            raise SettingsError(
                "trainer.strategy is DeepSpeed, a package that is not installed (pip install deepspeed); nearest: "
                "FSDP2 (--config strategies/fsdp2)."
            )
        super().__init__(stage=2, offload_optimizer=offload_optimizer)
        # half precision of the engine's own would cast what trains
        self.config = {**cast(dict[str, Any], self.config), "bf16": {"enabled": False}, "fp16": {"enabled": False}}

    def setup_environment(self) -> None:
        """Refuse what cannot work, and take over precision.

        Raises:
            SettingsError: the trainer's accelerator is no GPU, or its precision scales the loss.
        """
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise SettingsError(
                f"trainer.accelerator is {type(self.accelerator).__name__}, and DeepSpeed works on GPUs alone; "
                "nearest: FSDP2 (--config strategies/fsdp2)."
            )
        precision: Any = self.precision_plugin.precision
        if precision == "16-mixed":
            raise SettingsError(
                'trainer.strategy is DeepSpeed and trainer.precision "16-mixed", which would keep adapters in float16; '
                'nearest: "bf16-mixed".'
            )
        self.precision_plugin = _Autocast(precision)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse what cannot work.

        Raises:
            SettingsError: a schedule that reads gradients or writes what trains, an optimizer of single tensors.
        """
        self.refuse(trainer.callbacks)  # type: ignore[attr-defined]
        super().setup(trainer)

    def refuse(self, callbacks: Sequence[Callback]) -> None:
        """Raise `SettingsError` for a callback that cannot act under this strategy."""
        for callback in callbacks:
            if not isinstance(callback, ScheduleCallback):
                continue
            reads = type(callback).on_gradients is not ScheduleCallback.on_gradients
            if reads or callback.writes_values:
                what = "reads gradients, which" if reads else "writes what trains between steps, whose copies"
                raise SettingsError(
                    f"trainer.strategy is DeepSpeed, but {type(callback).__name__} {what} DeepSpeed keeps to itself. "
                    "Take FSDP2, or ddp."
                )

    def on_train_start(self) -> None:
        """Refuse windows that DeepSpeed would fill up with batches of the next epoch.

        Raises:
            SettingsError: the batches of an epoch do not divide by `accumulate_grad_batches`.
        """
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
        if window > 1 and batches % window:
            nearest = f"limit_train_batches {int(batches - batches % window)}" if batches > window else "fewer batches"
            raise SettingsError(
                f"trainer.strategy is DeepSpeed and accumulate_grad_batches {window}, which does not divide the "
                f"{batches} batches of an epoch: the rest would join the next one's. Nearest: {nearest}, or FSDP2."
            )

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any | None = None
    ) -> Any:
        pairs = hasattr(optimizer, "bind_pairs")
        if pairs or any(group.get("clip") is not None for group in getattr(optimizer, "param_groups", ())):
            what = "acts on tensors by themselves" if pairs else "has groups that are clipped by themselves"
            raise SettingsError(
                f"trainer.strategy is DeepSpeed, but {type(optimizer).__name__} {what}, and DeepSpeed holds gradients "
                "in flat shards. Take FSDP2, or ddp."
            )
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """One file, written by the first process."""
        path, kept = self.broadcast(filepath), {**checkpoint, "optimizer_states": []}
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(kept, path, storage_options=storage_options)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, for all verbs but `fit`.

        Raises:
            ResumeError: a run is to go on.
        """
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            raise ResumeError(
                "trainer.strategy is DeepSpeed; its checkpoints hold no optimizer state, so a run cannot go on from "
                "one exactly. Train under FSDP2, or start anew from the adapter."
            )
        return read_by_all(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As one process does."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
