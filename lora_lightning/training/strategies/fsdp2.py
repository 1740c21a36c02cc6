"""FSDP2: frozen weights, adapters and optimizer states are sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lora_lightning.distributed import gather, reshard, shard_like
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.records import injected_root
from lora_lightning.storage.state import adapter_state
from lora_lightning.training.strategies.sharded import check_base_unread, load_optimizers, optimizer_state, set_up
from lora_lightning.training.strategies.units import roots, shard
from lora_lightning.training.trainer_checkpoints import read_by_all


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism on `fully_shard`: frozen weights, adapters and optimizer states sharded.

    The module is cut up after `configure_model`, so after adapters are in it; a module that knows nothing of sharding
    needs no change. Blocks are what the model's class says must not be split, or repeated lists of modules.

    Args:
        reshard_after_forward: give a block's weights back between forward and backward: least memory; False keeps them
            and saves a collective a block.
        cpu_offload: keep the shards of frozen blocks in the CPU's memory, from where each step fetches them.
        process_group_backend: "nccl", "gloo" or None for the device's own.
        timeout: of a collective.
    """

    reads_on_first_rank = True
    """The first process reads weights; `AdapterModule` builds the model without values on the others."""

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

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
        """Cut the module up, then make its optimizers.

        Raises:
            SettingsError: frozen weights are to wait on the CPU, and steps are taken there as well, or a callback needs
                these weights between steps.
        """
        self.refuse(trainer.callbacks)  # type: ignore[attr-defined]
        set_up(self, trainer, self._cut)

    def refuse(self, callbacks: Sequence[Callback]) -> None:
        """Raise `SettingsError` for a callback that cannot act under this strategy, or a CPU to offload to itself."""
        if self.cpu_offload and isinstance(self.accelerator, CPUAccelerator):
            raise SettingsError(
                "trainer.strategy is FSDP2 with cpu_offload, but steps are taken on the CPU, where all weights lie "
                "already. Set cpu_offload to false."
            )
        if self.cpu_offload:
            own = "FSDP2 with cpu_offload"
            check_base_unread(callbacks, own, "then wait on the CPU, away from the adapters. Set cpu_offload to false.")

    def _cut(self, model: nn.Module) -> nn.Module:
        mesh = self.device_mesh["data_parallel"]
        for root in roots(model).values():
            shard(root, mesh, self.root_device, self.reshard_after_forward, self.cpu_offload)
        if self.cpu_offload:
            _update_properties(model, device=self.root_device)  # where steps are taken; blocks stay where they are
        else:
            self.model_to_device()
        return model

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Give back afterwards what the step has gathered: what is read and written between steps is sharded."""
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
        """Full tensors: of the adapters alone where the module's files hold no more, else of everything."""
        assert self.model is not None
        state = self.model.state_dict() if self._files_are_complete() else adapter_state(self.model)
        return dict(zip(state, (t.cpu() for t in gather(list(state.values()))), strict=True))

    def _files_are_complete(self) -> bool:
        assert self.lightning_module is not None
        try:
            injected_root(self.lightning_module)
        except AdapterStateError:
            return True
        return self.lightning_module.strict_loading

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, as one process reads it."""
        return read_by_all(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its shards."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {k: shard_like(v, own[k]) if k in own else v for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state with full tensors, by number of the parameter."""
        return optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """States shaped like their parameter are cut like it."""
        load_optimizers(self, checkpoint)
