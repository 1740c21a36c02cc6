"""From adapters to an optimizer: named groups of trainables, rate ratios, and factor pairs for optimizers that ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lora_lightning.adapters.base import FactorPair, GroupSpec, trains
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.injection.records import adapters_named, injected_root, records, trainable_adapters
from lora_lightning.optim.refused_setting import refused_setting
from lora_lightning.optim.wrapper import adamw

OptimizerFactory = Callable[[Any], Optimizer]


NEW_HEAD = 3.0
"""Rate of a head that starts at random over the adapters'; docs/optimizers.md has what it was measured by."""


def head_ratio(given: float | None, is_new: bool) -> float:
    """Rate of fully trained base parameters over the optimizer's, where none is given: higher for new heads."""
    if given is not None:
        return given
    return NEW_HEAD if is_new else 1.0


def group_specs(model: nn.Module, head_lr_ratio: float = 1.0) -> dict[str, GroupSpec]:
    """Groups of everything that trains: what each method declares, and "head" for fully trained base parameters.

    Args:
        model: a model with adapters.
        head_lr_ratio: rate of the group "head" over the optimizer's.

    Raises:
        TrainingError: nothing trains, or a method forgets a parameter or names it twice.
    """
    root = injected_root(model)
    specs = adapter_groups(root)
    heads: dict[int, nn.Parameter] = {}
    for record in records(root).values():
        trained = [root.get_parameter(parameter) for parameter in record.trained]
        heads |= {id(parameter): parameter for parameter in trained if parameter.requires_grad}
    if heads:
        specs["head"] = GroupSpec(params=list(heads.values()), lr_ratio=head_lr_ratio)
    _check_complete(root, specs)
    return specs


def adapter_groups(root: nn.Module) -> dict[str, GroupSpec]:
    """Groups of the adapters that train, as their methods declare them; of several adapters by `<adapter>.<group>`."""
    specs: dict[str, GroupSpec] = {}
    for name, record in records(root).items():
        adapters = {path: adapter for path, adapter in adapters_named(root, name).items() if trains(adapter)}
        if adapters:
            prefix = "" if len(records(root)) == 1 else f"{name}."
            specs |= {f"{prefix}{group}": spec for group, spec in record.method.param_groups(adapters).items()}
    return specs


def _check_complete(root: nn.Module, specs: dict[str, GroupSpec]) -> None:
    trainable = {id(p): name for name, p in root.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError(
            "nothing trains: every parameter is frozen; call set_trainable, or choose a method that trains."
        )
    grouped = [id(p) for spec in specs.values() for p in spec.params]
    forgotten = [name for key, name in trainable.items() if grouped.count(key) != 1]
    if forgotten:
        raise TrainingError(f"param_groups must hold every trainable exactly once; it does not for {forgotten[0]}.")


def build_optimizer(
    model: nn.Module, factory: OptimizerFactory | None, head_lr_ratio: float = 1.0, where: str = ""
) -> Optimizer:
    """An optimizer over the trainables only.

    Args:
        model: a model with adapters.
        factory: makes an optimizer from parameter groups; None takes the first method's own, else AdamW at 1e-3.
        head_lr_ratio: rate of fully trained base parameters over the optimizer's.
        where: dotted place of its settings, for errors; without one they name the optimizer's class.

    Raises:
        SettingsError: the optimizer refuses a setting; where `where` is given, it has a rate of 0.
        TrainingError: nothing trains, or a method forgets a parameter or names it twice.

    An optimizer with a method `bind_pairs(pairs)` receives the factor pairs of all trainable adapters.
    """
    specs = group_specs(model, head_lr_ratio)
    groups = []
    for name, spec in specs.items():
        group: dict[str, Any] = {
            "params": list(spec.params),
            "name": name,
            "lr_ratio": spec.lr_ratio,
            "clip": spec.clip,
        }
        if spec.weight_decay is not None:
            group["weight_decay"] = spec.weight_decay
        groups.append(group)
    make = factory or _methods_own(model) or adamw
    try:
        optimizer = make([{**group} for group in groups])
    except Exception as error:  # whatever the optimizer's author raises
        refused = refused_setting(error, groups, where if factory else "")
        if refused is None and isinstance(error, ValueError) and not isinstance(error, SettingsError):
            refused = SettingsError(f"{where or 'optimizer'}: {error}.")
        if refused is None:
            raise
        raise refused from error
    if where and all(group["lr"] == 0 for group in optimizer.param_groups):
        raise SettingsError(f"{where}: its rate (lr) is 0, so that nothing would be trained; it must be above 0.")
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group["lr_ratio"]
    if hasattr(optimizer, "bind_pairs"):
        optimizer.bind_pairs(factor_pairs(model))
    return optimizer


def _methods_own(model: nn.Module) -> OptimizerFactory | None:
    """The default of the first method that has one."""
    for record in records(injected_root(model)).values():
        own = record.method.optimizer()
        if own is not None:
            return own
    return None


def factor_pairs(model: nn.Module) -> tuple[FactorPair, ...]:
    """Factor pairs of all trainable adapters, named by path."""
    return tuple(
        FactorPair(f"{path}.{pair.name}".rstrip("."), pair.lora_A, pair.lora_B, pair.scaling)
        for path, adapter in trainable_adapters(model).items()
        for pair in adapter.factor_pairs()
    )
