"""What was injected must train, in an optimizer, and the weights under it must stay frozen.

A project's fine-tuning callback freezes what it is given, adapters too, and thaws base weights, which no adapter file
holds. An optimizer over a part of the module may leave adapters out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from lora_lightning.errors import TrainingError
from lora_lightning.injection.records import injected_roots
from lora_lightning.injection.switches import meant_parameters
from lora_lightning.models.paths import plain


def check_injected(trainer: Trainer, module: LightningModule) -> dict[int, str]:
    """Compare what trains with what was injected, before the first step.

    Returns:
        The parameters of injected models that must stay frozen: id to name.

    Raises:
        TrainingError: an adapter or head is frozen or in no optimizer, or a base weight trains.
    """
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    holds_copies = getattr(trainer.strategy, "hides_gradients", False)
    names = {id(p): plain(name) for name, p in module.named_parameters()}
    base: dict[int, str] = {}
    for root in injected_roots(module):
        meant = meant_parameters(root)
        frozen = [names[id(own[0])] for own in meant if not any(p.requires_grad for p in own)]
        if frozen:
            raise TrainingError(
                f"{frozen[0]} was frozen after it had been injected ({len(frozen)} adapters and heads in all), and "
                f"would not train.{_blame(trainer)} Let it train by set_trainable, or leave out what froze it."
            )
        left_out = sorted(names[id(p)] for own in meant for p in own if p.requires_grad and id(p) not in held)
        if left_out and not holds_copies:
            raise TrainingError(
                f"{left_out[0]} is in no optimizer ({len(left_out)} injected tensors in all), and would not train. "
                "Hand it every parameter with requires_grad, or take "
                "lora_lightning.optim.groups.build_optimizer(self, factory)."
            )
        own_parameters = {id(p) for own in meant for p in own}
        base |= {id(p): names[id(p)] for p in root.parameters() if id(p) not in own_parameters}
    refuse_thawed(trainer, trainer.optimizers, base)
    return base


def refuse_thawed(trainer: Trainer, optimizers: Sequence[Optimizer], base: Mapping[int, str]) -> None:
    """Raise `TrainingError` for a parameter in `base`, id to name, that one of the optimizers trains."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in base and p.requires_grad:
                    raise TrainingError(
                        f"{base[id(p)]} is a weight of the base model and trains, which no adapter file would hold."
                        f"{_blame(trainer)} Keep it frozen, or name it in also_train, which trains and saves it."
                    )


def _blame(trainer: Trainer) -> str:
    """The callback of a run that freezes and thaws by itself, as a sentence; empty without any."""
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning)]  # type: ignore[attr-defined]
    return f" The callback {found[0]} freezes and thaws by itself." if found else ""
