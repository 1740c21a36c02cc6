"""Sharded training: FSDP2 and FSDP1 for models with adapters, with checkpoints that hold the adapter alone.

    configure_model     the model is loaded by the first process and injected on all; elsewhere it has no values yet
    setup               each block is sent and cut (`sharding.shard`), then optimizers are made
    save                pieces of adapters and optimizer states are gathered; the file is what one process would write
    load                each process takes its pieces from that file

So a checkpoint does not know how many processes wrote it, or under which strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from lora_lightning.adapters.base import Adapter
from lora_lightning.checkpoint import adapter_state
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.fingerprint import keep_fingerprint
from lora_lightning.injection import injected_root, records
from lora_lightning.pieces import gather, gather_nested, laid_out
from lora_lightning.saving import read_by_all
from lora_lightning.sharding import blocks, reshard, roots, shard
from lora_lightning.zero import DeepSpeed

__all__ = ["FSDP1", "FSDP2", "DeepSpeed", "check_strategy"]


def check_strategy(strategy: Strategy) -> None:
    """Refuse Lightning's own strategies that shard.

    They know nothing of adapters: they would write frozen weights, or shard nothing where the module does not itself.

    Raises:
        SettingsError: it is one of them; names ours.
    """
    for theirs, ours, config in (
        (ModelParallelStrategy, FSDP2, "fsdp2"),
        (FSDPStrategy, FSDP1, "fsdp"),
        (DeepSpeedStrategy, DeepSpeed, "deepspeed"),
    ):
        if isinstance(strategy, theirs) and not isinstance(strategy, ours):
            raise SettingsError(
                f"trainer.strategy is {type(strategy).__name__}, which knows nothing of adapters; "
                f"nearest: {ours.__name__} (--config strategies/{config})."
            )


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism on `fully_shard`: frozen weights, adapters and optimizer states in pieces.

    The module is cut up after `configure_model`, so after adapters are in it; a module that knows nothing of sharding
    needs no change. Blocks are what the model's class says must not be split, or repeated lists of modules.

    Args:
        reshard_after_forward: give a block's weights back between forward and backward: least memory; False keeps them
            and saves a collective a block.
        cpu_offload: keep the pieces of frozen blocks in the CPU's memory, from where each step fetches them.
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
        _set_up(self, trainer, self._cut)

    def refuse(self, callbacks: Sequence[Callback]) -> None:
        """Raise `SettingsError` for a callback that cannot act under this strategy, or a CPU to offload to itself."""
        if self.cpu_offload and isinstance(self.accelerator, CPUAccelerator):
            raise SettingsError(
                "trainer.strategy is FSDP2 with cpu_offload, but steps are taken on the CPU, where all weights lie "
                "already. Set cpu_offload to false."
            )
        if self.cpu_offload:
            own = "FSDP2 with cpu_offload"
            _check_base_unread(
                callbacks, own, "then wait on the CPU, away from the adapters. Set cpu_offload to false."
            )

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
        """Each process takes its pieces."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {k: laid_out(v, own[k]) if k in own else v for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state with whole tensors, by number of the parameter."""
        return _optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """States shaped like their parameter are cut like it."""
        _load_optimizers(self, checkpoint)


def _set_up(strategy: FSDP2 | FSDP1, trainer: Trainer, cut: Callable[[nn.Module], nn.Module]) -> None:
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


def _optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return cast("dict[str, Any]", gather_nested(inner.state_dict()))


def _load_optimizers(strategy: FSDP2 | FSDP1, checkpoint: Mapping[str, Any]) -> None:
    """Load whole states; those shaped like their parameter are cut where it is."""
    for optimizer, saved in zip(strategy.optimizers, checkpoint["optimizer_states"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {
                name: laid_out(value, params[number]) if _like(value, params[number]) else value
                for name, value in entries.items()
            }
            for number, entries in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": state})
    _optimizers_to_device(strategy.optimizers, strategy.root_device)


def _check_base_unread(callbacks: Sequence[Callback], strategy: str, why: str) -> None:
    """Raise `SettingsError` for a callback that reads frozen weights where the strategy does not let it."""
    for callback in callbacks:
        if getattr(callback, "reads_base", False):
            raise SettingsError(
                f"trainer.strategy is {strategy}, but {type(callback).__name__} reads or writes frozen weights between "
                f"steps, which {why}"
            )


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


class FSDP1(FSDPStrategy):
    """Fully sharded data parallelism of torch's first kind: frozen weights in pieces, what trains whole everywhere.

    Frozen blocks are its units. Adapters and trained heads stay apart from them, and their gradients are averaged after
    each backward. So every method, optimizer and schedule acts as under DDP, but for what reads or writes frozen
    weights between steps, which is refused. It needs GPUs.

    Args:
        cpu_offload: keep the pieces of frozen weights in the CPU's memory.
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
            SettingsError: a callback that needs frozen weights between steps.
            AdapterStateError: no adapters, or files that would hold frozen weights.
        """
        self.refuse(trainer.callbacks)  # type: ignore[attr-defined]
        _set_up(self, trainer, self._setup_model)

    def refuse(self, callbacks: Sequence[Callback]) -> None:
        """Raise `SettingsError` for a callback that cannot act under this strategy."""
        _check_base_unread(callbacks, "FSDP1", "FSDP1 keeps in flat pieces. Take FSDP2, or ddp.")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        assert self.lightning_module is not None
        root = injected_root(model)
        if self.lightning_module.strict_loading:
            raise AdapterStateError(
                "under FSDP1 checkpoints hold the adapter alone; set strict_loading = False, or give InjectAdapters "
                'checkpoint="adapter". FSDP2 writes all of a module.'
            )
        record = records(root)
        keep_fingerprint(root, [name for own in record.values() for name in own.trained])
        owners = [root.get_submodule(name.rpartition(".")[0]) for own in record.values() for name in own.trained]
        apart = [module for module in root.modules() if isinstance(module, Adapter)] + owners
        for module in apart:
            module.to(self.root_device)
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)
        self._apart = [p for p in model.parameters() if p.requires_grad]
        units = {id(block) for block in blocks(root).values()}
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

    def post_backward(self, closure_loss: Tensor) -> None:  # noqa: ARG002 - Lightning's signature
        """Average the gradients of what trains over processes; what has none anywhere keeps none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._apart]
        there = torch.tensor([float(p.grad is not None) for p in self._apart], device=self.root_device)
        packed = torch.cat([there, *(grad.reshape(-1) for grad in grads)])
        torch.distributed.all_reduce(packed)
        there, *sums = packed.split([len(grads), *(grad.numel() for grad in grads)])
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

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: ARG002
        """Copy the adapters' tensors; the module has compared the keys."""
        assert self.lightning_module is not None
        for key, tensor in adapter_state(self.lightning_module).items():
            tensor.copy_(checkpoint["state_dict"][key])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state, which is whole."""
        return _optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load it."""
        _load_optimizers(self, checkpoint)
