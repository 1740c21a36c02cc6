"""Which setting an optimizer's class has refused: its dotted name, value and rule, for classes of anybody.

Classes of torch and of others say "Invalid learning rate: -1" and nothing of where it stands. The arguments are in the
frames of the exception; which of them is at fault is found by building the optimizer again, that one left at its
default.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lora_lightning.errors import LoraLightningError, SettingsError
from lora_lightning.optim.pair_optimizer import RULES

USUAL = {"lr": 1e-3}
"""Values that are tried for settings without a default."""


def refused_setting(error: Exception, groups: Sequence[Mapping[str, Any]], where: str = "") -> SettingsError | None:
    """The error that names the setting, or None where no single one is at fault.

    Args:
        error: what the optimizer's constructor has raised, with its traceback.
        groups: parameter groups that it was given; they are not changed.
        where: dotted place of the optimizer, such as "model.optimizer"; without one its class stands for it.
    """
    if isinstance(error, LoraLightningError) and not isinstance(error, SettingsError):
        return None
    for optimizer, given in reversed(calls := _constructors(error)):
        name = _at_fault(type(optimizer), given, groups)
        if name is not None:
            outer = calls[: [one for one, _ in calls].index(optimizer)]
            return _named(error, type(optimizer), name, given[name], _place(where, outer, type(optimizer)))
    return None


def _constructors(error: Exception) -> list[tuple[Optimizer, dict[str, Any]]]:
    """Optimizers that were being made, outermost first, with the arguments of their own class but the parameters."""
    found: dict[int, tuple[Optimizer, dict[str, Any]]] = {}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names, _, keywords, values = inspect.getargvalues(frame)
        made = values.get(names[0]) if names else None
        if frame.f_code.co_name == "__init__" and isinstance(made, Optimizer) and len(names) > 1:
            code = frame.f_code
            names = [*names, *code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]]
            given = {name: values[name] for name in dict.fromkeys(names[2:]) if name in values}
            found.setdefault(id(made), (made, {**given, **(values.get(keywords, {}) if keywords else {})}))
    return list(found.values())


def _at_fault(kind: type[Optimizer], given: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The setting without whose value the class takes all others, else the first that it takes on no account."""
    parameters = inspect.signature(kind).parameters
    usual = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
    usual = {name: {**USUAL, **usual}[name] for name in given if name in {**USUAL, **usual}}
    others = {name: value for name, value in usual.items() if repr(value) != repr(given[name])}
    alone = [name for name in others if _takes(kind, {**given, name: usual[name]}, groups)]
    if len(alone) == 1:
        return alone[0]
    if alone or not _takes(kind, {**given, **usual}, groups):
        return alone[-1] if alone else None
    return next(
        (name for name in others if not _takes(kind, {**given, **usual, name: given[name]}, groups)),
        None,
    )


def _takes(kind: type[Optimizer], settings: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    try:
        kind([{**group, "params": list(group["params"])} for group in groups], **settings)
    except Exception:  # whatever its author raises
        return False
    return True


def _place(where: str, outer: Sequence[tuple[Optimizer, dict[str, Any]]], kind: type[Optimizer]) -> str:
    """Where the settings of the class stand; an optimizer within another stands at the argument that makes it."""
    if not where:
        return kind.__name__
    for _, given in outer:
        makers = [name for name, value in given.items() if callable(value)]
        if len(makers) != 1:
            return kind.__name__
        where = f"{where}.init_args.{makers[0]}"
    return f"{where}.init_args"


def _named(error: Exception, kind: type[Optimizer], name: str, value: Any, place: str) -> SettingsError:
    own = f"{kind.__name__}.{name} "
    if isinstance(error, SettingsError):
        text = str(error)
        return SettingsError(f"{place}.{name} {text.removeprefix(own)}") if text.startswith(own) else error
    holds, rule = RULES.get(name, (lambda _: True, ""))
    try:
        broken = not holds(value)
    except TypeError:
        broken = True
    default = inspect.signature(kind).parameters[name].default
    usual = "" if default is inspect.Parameter.empty else f" Its default is {default!r}."
    words = str(error).strip().rstrip(".")
    said = f'{kind.__name__} says "{words}".' if words else f"{kind.__name__} refuses it."
    return SettingsError(f"{place}.{name} is {value!r}; {rule + ' ' if broken else ''}{said}{usual}")
