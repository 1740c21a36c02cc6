"""The line of a run's header that says how high the learning rate is, and who chose it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lora_lightning.callbacks.step_counting import total_steps
from lora_lightning.injection.records import injected_root, records
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.optim.wrapper import innermost


def rate_line(trainer: Trainer, module: LightningModule, given: str = "") -> str:
    """Full rates, by group where they differ, the optimizer, who chose the rate, and its schedule; empty without rates.

    Args:
        trainer: of a run whose optimizers are made.
        module: what it trains.
        given: who chose the rate, where the caller knows.
    """
    optimizers: list[Optimizer] = trainer.optimizers
    if not any(optimizer.param_groups for optimizer in optimizers):
        return ""
    names = ", ".join(dict.fromkeys(type(innermost(optimizer)).__name__ for optimizer in optimizers))
    parts = [f"rate: {_rates(optimizers)} of {names}, {given or _chosen_by(module)}"]
    schedule, total = getattr(module, "lr_scheduler", None), total_steps(trainer)
    if isinstance(schedule, WarmUp) and total is not None:
        steps = round(schedule.warmup_fraction * total)
        parts.append(f"{f'warm-up over {steps} of {total} steps' if steps else 'no warm-up'}, then {schedule.decay}")
    return "; ".join(parts)


def _rates(optimizers: list[Optimizer]) -> str:
    """The full rate of the first group, and those of groups that have another one, by name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full = [float(group.get("initial_lr", group["lr"])) for group in groups]
    named = enumerate(zip(groups, full, strict=True))
    others = [f"{rate:g} ({group.get('name', number)})" for number, (group, rate) in named if rate != full[0]]
    return ", ".join([f"{full[0]:g}", *others])


def _chosen_by(module: LightningModule) -> str:
    if not hasattr(module, "optimizer_factory"):
        return f"from {type(module).__name__}.configure_optimizers"
    if module.optimizer_factory is not None:
        return "as model.optimizer says"
    held: dict[str, Any] = records(injected_root(module))
    own = next((type(one.method).__name__ for one in held.values() if one.method.optimizer() is not None), None)
    return f"the default of {own}" if own else "the default where model.optimizer is null"
