"""Lightning's callbacks that cannot work beside adapters: one line each, with what to use instead."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelPruning,
    WeightAveraging,
)
from torch import nn

from lora_lightning.errors import SettingsError

_INSTEAD: dict[type[Callback], str] = {
    ModelPruning: "takes weights of layers by their names, which are those of the frozen base; the callbacks "
    "RankPruning and SparsitySchedule prune adapters, and base weights can be pruned before adapters are injected",
    BatchSizeFinder: "trains the adapters in trial runs that checks and schedules take for the run itself; `python -m "
    "lora_lightning estimate` says what a batch needs in memory, and batch_size sets its size",
    LearningRateFinder: "trains the adapters in trial runs that checks and schedules take for the run itself; "
    "`model.optimizer.lr: auto` on the command line runs it apart from them",
}


def refuse_beside(callbacks: Iterable[Callback], module: nn.Module) -> None:
    """Raise `SettingsError` for a callback that would fail, or spoil what adapters hold.

    Args:
        callbacks: those of the run.
        module: the module that is to train.
    """
    for callback in callbacks:
        kind = type(callback).__name__
        for refused, instead in _INSTEAD.items():
            if isinstance(callback, refused):
                raise SettingsError(f"callbacks: {kind} {instead}. Leave it out.")
        if isinstance(callback, BackboneFinetuning) and not hasattr(module, "backbone"):
            raise SettingsError(
                f"callbacks: {kind} thaws the module's `backbone`, and {type(module).__name__} has none: the base "
                "stays frozen under adapters. Leave it out; also_train names what else trains."
            )
        if isinstance(callback, WeightAveraging) and callback._use_buffers and "avg_fn" not in callback._kwargs:
            raise SettingsError(
                f"{kind}.use_buffers is True, and the mean would be taken of masks of adapters, which are no numbers; "
                "set it to False, or take EMAWeightAveraging."
            )
