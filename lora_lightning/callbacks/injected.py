"""What was injected must train, in an optimizer, and the weights under it must stay frozen.

A project's fine-tuning callback freezes what it is given, adapters too, and thaws base weights, which no adapter file
holds. An optimizer over a part of the module may leave adapters out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.distributed import local
from lora_lightning.errors import TrainingError
from lora_lightning.injection.records import injected_roots, iter_adapters, records, trained_in
from lora_lightning.injection.switches import meant_parameters
from lora_lightning.models.anatomy import survey
from lora_lightning.models.paths import plain
from lora_lightning.storage.fingerprint import counted, has_kept_fingerprint, still_statistics

_ENTRIES = 1024
"""How many entries of a tensor are compared, about."""


def check_injected(trainer: Trainer, module: LightningModule) -> Injected:
    """Compare what trains with what was injected, before the first step.

    Returns:
        What must stay true of it.

    Raises:
        TrainingError: an adapter or head is frozen or in no optimizer, or a base weight trains.
    """
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    holds_copies = getattr(trainer.strategy, "hides_gradients", False)
    names, everything = _names(module), []
    base: dict[str, nn.Parameter] = {}
    for root in injected_roots(module):
        meant = meant_parameters(root)
        frozen = [names[id(own[0])] for own in meant if not any(p.requires_grad for p in own)]
        if frozen:
            raise _frozen(trainer, frozen[0], len(frozen))
        left_out = sorted(names[id(p)] for own in meant for p in own if p.requires_grad and id(p) not in held)
        if left_out and not holds_copies:
            raise TrainingError(
                f"{left_out[0]} is in no optimizer ({len(left_out)} injected tensors in all), and would not train. "
                "Hand it every parameter with requires_grad, or take "
                "lora_lightning.optim.groups.build_optimizer(self, factory)."
            )
        own_parameters = {id(p) for own in meant for p in own}
        base |= {names[id(p)]: p for p in root.parameters() if id(p) not in own_parameters}
        everything += meant
    found = Injected(dict(iter_adapters(module)), everything, base, _values(module))
    found.refuse_thawed(trainer)
    return found


@dataclass
class Injected:
    """What was injected, at the start of training, and what must stay true of it until its end.

    Attributes:
        layers: adapted layers by path.
        meant: parameters that train, adapter by adapter and head by head.
        base: parameters of injected models that must stay frozen, by name.
        values: of base weights and running statistics some entries each, by name.
    """

    layers: dict[str, AdaptedLayer]
    meant: list[list[nn.Parameter]]
    base: dict[str, nn.Parameter]
    values: dict[str, Tensor]

    def check(self, trainer: Trainer, module: nn.Module) -> None:
        """Compare before a batch, what costs nothing.

        Raises:
            TrainingError: adapters are frozen or merged, or a base weight trains.
        """
        merged = [path for path, layer in self.layers.items() if layer.merged]
        if merged:
            raise TrainingError(
                f"{merged[0]} was merged while the run trains ({len(merged)} layers in all), so that its adapter is no "
                "longer in the loss. Call unmerge, or merge after the run."
            )
        frozen = [own for own in self.meant if not any(p.requires_grad for p in own)]
        if frozen:
            raise _frozen(trainer, _names(module)[id(frozen[0][0])], len(frozen))
        self.refuse_thawed(trainer)

    def refuse_thawed(self, trainer: Trainer) -> None:
        """Raise `TrainingError` where a base weight trains, be it in an optimizer or not."""
        thawed = next((name for name, p in self.base.items() if p.requires_grad), None)
        if thawed is not None:
            raise TrainingError(
                f"{thawed} is a weight of the base model and trains, which no adapter file would hold."
                f"{_blame(trainer)} Keep it frozen, or name it in also_train, which trains and saves it."
            )

    def check_end(self, module: nn.Module) -> None:
        """Compare at the end what takes a look at every tensor.

        Raises:
            TrainingError: layers were replaced, or base weights or running statistics have other values.
        """
        now = {id(layer) for _, layer in iter_adapters(module)}
        gone = [path for path, layer in self.layers.items() if id(layer) not in now]
        if gone:
            raise TrainingError(
                f"{gone[0]} is no longer the layer that was injected ({len(gone)} in all): something has replaced it "
                "while the run trained, and its adapter is lost. Replace layers before they are injected."
            )
        found = _values(module)
        moved = [name for name, was in self.values.items() if name in found and not _same(found[name], was)]
        if moved:
            raise TrainingError(
                f"{moved[0]} belongs to the frozen base model and has other values than at the start "
                f"({len(moved)} tensors in all), so that no adapter file would fit. Leave out the callback or the code "
                "that writes them, or name them in also_train, which trains and saves them."
            )


def _values(module: nn.Module) -> dict[str, Tensor]:
    """A few entries of every frozen tensor of injected models that is a plain one, as far as this process holds it."""
    found: dict[str, Tensor] = {}
    for root in injected_roots(module):
        if has_kept_fingerprint(root):  # its parameters lie in flat ones
            continue
        anatomy, trained = survey(root), trained_in(root, list(records(root)))
        for name, tensor in (counted(anatomy, trained) | still_statistics(anatomy, trained)).items():
            held = local(tensor).detach()
            if type(held) in (Tensor, nn.Parameter) and not held.is_meta and held.numel():
                flat = held.reshape(-1)
                found[name] = flat[:: max(1, len(flat) // _ENTRIES)].clone()
    return found


def _same(now: Tensor, was: Tensor) -> bool:
    """Whether values are equal, as far as there are as many: a strategy may have moved weights elsewhere."""
    return now.shape != was.shape or now.dtype != was.dtype or torch.equal(now, was.to(now.device))


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): plain(name) for name, p in module.named_parameters()}


def _frozen(trainer: Trainer, name: str, count: int) -> TrainingError:
    return TrainingError(
        f"{name} was frozen after it had been injected ({count} adapters and heads in all), and would not train."
        f"{_blame(trainer)} Let it train by set_trainable, or leave out what froze it."
    )


def _blame(trainer: Trainer) -> str:
    """The callback of a run that freezes and thaws by itself, as a sentence; empty without any."""
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning)]  # type: ignore[attr-defined]
    return f" The callback {found[0]} freezes and thaws by itself." if found else ""
