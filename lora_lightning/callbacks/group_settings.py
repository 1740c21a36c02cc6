"""What a method wants of groups of its parameters, in a module that builds its own optimizer: rate, decay, clipping.

`GroupSpec` states it. AdapterModule's optimizer has such groups; one over `self.parameters()` has a single group, which
is divided here where no learning-rate scheduler knows it yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lora_lightning.adapters.base import GroupSpec
from lora_lightning.errors import TrainingError
from lora_lightning.injection.records import injected_root
from lora_lightning.optim.groups import adapter_groups


def apply_group_settings(trainer: Trainer, module: LightningModule) -> None:
    """Give the parameters of each declared group its rate, decay and clipping, in the project's optimizers.

    A group that holds nothing else is the project's own choice of rate and decay.

    Raises:
        TrainingError: a group would have to be divided, and a scheduler of learning rates knows it already.
    """
    for name, spec in adapter_groups(injected_root(module)).items():
        wanted = {id(p) for p in spec.params}
        for optimizer in trainer.optimizers:
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in wanted]
                if not own or (len(own) < len(group["params"]) and not _differing(spec, group)):
                    continue
                if len(own) < len(group["params"]):
                    group = _divided(trainer, module, optimizer, group, own, name, spec)
                group.setdefault("clip", spec.clip)


def _differing(spec: GroupSpec, group: Mapping[str, Any]) -> dict[str, object]:
    """What the group would have to have and has not, by the words of `GroupSpec`."""
    found: dict[str, object] = {}
    if spec.lr_ratio != group.get("lr_ratio", 1.0):
        found["lr_ratio"] = spec.lr_ratio
    if spec.weight_decay is not None and spec.weight_decay != group.get("weight_decay", 0.0):
        found["weight_decay"] = spec.weight_decay
    if spec.clip != group.get("clip"):
        found["clip"] = spec.clip
    return found


def _divided(
    trainer: Trainer,
    module: LightningModule,
    optimizer: Optimizer,
    group: dict[str, Any],
    own: Iterable[nn.Parameter],
    name: str,
    spec: GroupSpec,
) -> dict[str, Any]:
    """A new group of the optimizer with these parameters, which leave the old one."""
    kind = type(optimizer).__name__
    settings = ", ".join(f"{key}={value}" for key, value in _differing(spec, group).items())
    if any(config.scheduler.optimizer is optimizer for config in trainer.lr_scheduler_configs):
        raise TrainingError(
            f'group "{name}" of the adapters wants {settings}, and {kind} holds it together with others. Two lines of '
            f"{type(module).__name__}.configure_optimizers make it act: `from lora_lightning.optim.groups import "
            f"build_optimizer`, and `optimizer = build_optimizer(self, lambda groups: {kind}(groups, lr=...))`."
        )
    moved = {id(p) for p in own}
    group["params"] = [p for p in group["params"] if id(p) not in moved]
    ratio = spec.lr_ratio / group.get("lr_ratio", 1.0)
    new = {**group, "params": list(own), "lr": group["lr"] * ratio, "lr_ratio": spec.lr_ratio, "clip": spec.clip}
    if spec.weight_decay is not None:
        new["weight_decay"] = spec.weight_decay
    optimizer.param_groups.append(new)
    if trainer.is_global_zero:
        print(f"  {kind}: group {name} has its own {settings}")
    return new
