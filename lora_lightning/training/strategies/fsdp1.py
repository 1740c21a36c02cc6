"""FSDP1: frozen weights are sharded; what trains is full on each process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from lora_lightning.adapters.base import Adapter
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.records import injected_root, records
from lora_lightning.storage.fingerprint import keep_fingerprint
from lora_lightning.storage.skeleton import keep_skeleton
from lora_lightning.storage.state import adapter_state
from lora_lightning.training.strategies.sharded import check_base_unread, load_optimizers, optimizer_state, set_up
from lora_lightning.training.strategies.units import find_blocks
from lora_lightning.training.trainer_checkpoints import read_by_all


class FSDP1(FSDPStrategy):
    """Fully sharded data parallelism of torch's first kind: frozen weights sharded, full tensors of what trains.

    Frozen blocks are its units. Adapters and trained heads stay apart from them, and their gradients are averaged after
    each backward. So every method, optimizer and schedule acts as under DDP, but for what reads or writes frozen
    weights between steps, which is refused. It needs GPUs.

    Args:
        cpu_offload: keep the shards of frozen weights in the CPU's memory.
        process_group_backend: "nccl" or None for the device's own.
        timeout: of a collective.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(cpu_offload=cpu_offload, process_group_backend=process_group_backend, timeout=timeout)
        self._apart: list[nn.Parameter] = []

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: optimizer states are plain."""
        return True

    @property
    def mixed_precision_config(self) -> None:
        """None: autocast casts, and weights keep their dtype."""

    def setup(self, trainer: Trainer) -> None:
        """Refuse what cannot work, then wrap.

        Raises:
            SettingsError: a callback that needs frozen weights between steps, or an adapter that replaces them.
            AdapterStateError: no adapters, or files that would hold frozen weights.
        """
        self.refuse(trainer.callbacks)  # type: ignore[attr-defined]
        set_up(self, trainer, self._setup_model)

    def refuse(self, callbacks: Sequence[Callback]) -> None:
        """Raise `SettingsError` for a callback that cannot act under this strategy."""
        check_base_unread(callbacks, "FSDP1", "FSDP1 keeps in flat shards. Take FSDP2, or ddp.")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        assert self.lightning_module is not None
        root = injected_root(model)
        if self.lightning_module.strict_loading:
            raise AdapterStateError(
                "under FSDP1 checkpoints hold the adapter alone; set strict_loading = False, or give InjectAdapters "
                'checkpoint="adapter". FSDP2 writes all of a module.'
            )
        for adapter in (module for module in root.modules() if isinstance(module, Adapter) and module.replaces_weight):
            raise SettingsError(
                f"trainer.strategy is FSDP1, but {type(adapter).__name__} calls layers with others in place of their "
                "frozen weights, which FSDP1 keeps in flat shards. Take FSDP2, or ddp."
            )
        record = records(root)
        keep_skeleton(root)
        keep_fingerprint(root, [name for own in record.values() for name in own.trained])
        owners = [root.get_submodule(name.rpartition(".")[0]) for own in record.values() for name in own.trained]
        apart = [module for module in root.modules() if isinstance(module, Adapter)] + owners
        for module in apart:
            module.to(self.root_device)
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)
        self._apart = [p for p in model.parameters() if p.requires_grad]
        units = {id(block) for block in find_blocks(root).values()}
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(lambda module: id(module) in units),
            ignored_states=apart,
            sync_module_states=self.root_device.type != "cpu",
            use_orig_params=True,
            cpu_offload=self.cpu_offload,
            device_id=self.root_device,
        )
        wrapped.check_is_root()  # now, before a unit that is called or saved by itself takes itself for the root
        return wrapped

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what trains over processes; what has none anywhere keeps none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._apart]
        there = torch.tensor([float(p.grad is not None) for p in self._apart], device=self.root_device)
        joined = torch.cat([there, *(grad.reshape(-1) for grad in grads)])
        torch.distributed.all_reduce(joined)
        there, *sums = joined.split([len(grads), *(grad.numel() for grad in grads)])
        for parameter, total, count in zip(self._apart, sums, there.tolist(), strict=True):
            if count:
                parameter.grad = total.div_(self.world_size).view_as(parameter).to(parameter.dtype)

    def inside(self, run: Callable[[], Any]) -> Any:
        """Run what calls the model outside a step through the wrapper, which gathers weights."""
        assert self.lightning_module is not None
        assert self.model is not None
        self.lightning_module.__dict__["_lora_lightning_run"] = run
        return self._forward_redirection(self.model, self.lightning_module, "_lora_lightning_run")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Tensors of the adapters."""
        assert self.lightning_module is not None
        return {key: tensor.cpu() for key, tensor in adapter_state(self.lightning_module).items()}

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, as one process reads it."""
        return read_by_all(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the adapters' tensors; the module has compared the keys. Frozen adapters below are not in the file."""
        assert self.lightning_module is not None
        saved = checkpoint["state_dict"]
        for key, tensor in adapter_state(self.lightning_module).items():
            if key in saved:
                tensor.copy_(saved[key])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state; its tensors are full."""
        return optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load it."""
        load_optimizers(self, checkpoint)
