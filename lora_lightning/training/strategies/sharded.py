"""What FSDP2 and FSDP1 share: the start of a run, and checkpoints that hold the adapter alone.

    configure_model     the model is loaded by the first process and injected on all; elsewhere it has no values yet
    setup               each block is sent and cut (`units.shard`), then optimizers are made
    save                shards of adapters and optimizer states are gathered; the file is what one process would write
    load                each process takes its shards from that file

So a checkpoint does not know how many processes wrote it, or under which strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.distributed import gather_nested, shard_like
from lora_lightning.errors import SettingsError


def set_up(strategy: ParallelStrategy, trainer: Trainer, cut: Callable[[nn.Module], nn.Module]) -> None:
    """What strategies do at the start of a run; `cut` gives the module as it is called in steps."""
    assert strategy.model is not None
    assert strategy.accelerator is not None
    strategy.accelerator.setup(trainer)
    if str(trainer.precision) == "bf16-true":  # other precisions leave weights as the module has made them
        strategy.model = strategy.precision_plugin.convert_module(strategy.model)
    strategy.model = cut(strategy.model)
    strategy.barrier()
    fits = trainer.state.fn == TrainerFn.FITTING
    if fits:
        strategy.setup_optimizers(trainer)
    strategy.setup_precision_plugin()
    if fits:
        _optimizers_to_device(strategy.optimizers, strategy.root_device)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state dictionary of an optimizer, its tensors gathered from all processes."""
    inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return cast("dict[str, Any]", gather_nested(inner.state_dict()))


def load_optimizers(strategy: ParallelStrategy, checkpoint: Mapping[str, Any]) -> None:
    """Load states of full tensors; those shaped like their parameter are cut where it is."""
    for optimizer, saved in zip(strategy.optimizers, checkpoint["optimizer_states"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {
                name: shard_like(value, params[number]) if _like(value, params[number]) else value
                for name, value in entries.items()
            }
            for number, entries in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": state})
    _optimizers_to_device(strategy.optimizers, strategy.root_device)


def check_base_unread(callbacks: Sequence[Callback], strategy: str, why: str) -> None:
    """Raise `SettingsError` for a callback that reads frozen weights where the strategy does not let it."""
    for callback in callbacks:
        if getattr(callback, "reads_base", False):
            raise SettingsError(
                f"trainer.strategy is {strategy}, but {type(callback).__name__} reads or writes frozen weights between "
                f"steps, which {why}"
            )


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
