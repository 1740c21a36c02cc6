"""Sharded training: FSDP2 and FSDP1 for models with adapters, with checkpoints that hold the adapter alone.

    configure_model     the model is loaded by the first process and injected on all; elsewhere it has no values yet
    setup               each block is sent and cut (`sharding.shard`), then optimizers are made
    save                pieces of adapters and optimizer states are gathered; the file is what one process would write
    load                each process takes its pieces from that file

So a checkpoint does not know how many processes wrote it, or under which strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lora_lightning.checkpoint import adapter_keys
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection import injected_root
from lora_lightning.sharding import gather, gather_nested, laid_out, reshard, roots, shard

__all__ = ["FSDP2"]


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism on `fully_shard`: frozen weights, adapters and optimizer states in pieces.

    The module is cut up after `configure_model`, so after adapters are in it; a module that knows nothing of sharding
    needs no change. Blocks are what the model's class says must not be split, or repeated lists of modules.

    Args:
        reshard_after_forward: give a block's weights back between forward and backward: least memory; False keeps them
            and saves a collective a block.
        process_group_backend: "nccl", "gloo" or None for the device's own.
        timeout: of a collective.
    """

    reads_on_first_rank = True
    """The first process reads weights; `AdapterModule` builds the model without values on the others."""

    def __init__(
        self,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: optimizer states are loaded like those of one process."""
        return True

    def setup_environment(self) -> None:
        """One mesh over all processes."""
        assert self.cluster_environment is not None
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Cut the module up, then make its optimizers."""
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        mesh = self.device_mesh["data_parallel"]
        self.model = self.precision_plugin.convert_module(self.model)
        for root in roots(self.model).values():
            shard(root, mesh, self.root_device, self.reshard_after_forward)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Give back afterwards what the step has gathered: what is read and written between steps is in pieces."""
        return self._step(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        return self._step(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        return self._step(super().predict_step, *args, **kwargs)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        assert self.model is not None
        reshard(self.model)
        return output

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors: of the adapters alone where the module's files hold no more, else of everything."""
        assert self.model is not None
        state = self.model.state_dict()
        keys = list(state) if self._files_are_complete() else adapter_keys(self.model)
        return dict(zip(keys, (t.cpu() for t in gather([state[key] for key in keys])), strict=True))

    def _files_are_complete(self) -> bool:
        assert self.lightning_module is not None
        try:
            injected_root(self.lightning_module)
        except AdapterStateError:
            return True
        return self.lightning_module.strict_loading

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, as one process reads it."""
        path = Path(self.broadcast(checkpoint_path))
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its pieces."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {k: laid_out(v, own[k]) if k in own else v for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state with whole tensors, by number of the parameter."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return cast("dict[str, Any]", gather_nested(inner.state_dict()))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """States shaped like their parameter are cut like it."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: laid_out(value, params[number]) if _like(value, params[number]) else value
                    for name, value in entries.items()
                }
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
        _optimizers_to_device(self.optimizers, self.root_device)


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
