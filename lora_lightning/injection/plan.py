"""A method's own settings for some layers, and start values from data: asked once, of the first process.

Of one field of one layer the user's `overrides` win, then the method's plan, then the method's field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, linked_modules
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.distributed import from_first, full_tensor, put
from lora_lightning.errors import PluginError, TargetError, did_you_mean
from lora_lightning.injection.answers import Answer
from lora_lightning.injection.probe import Probe
from lora_lightning.methods import Method, Plan, WrapperMethod, check_overridable, replace
from lora_lightning.models.meta import values_follow
from lora_lightning.models.paths import within

SKIPPED = "rank 0 in the method's plan"


def ask_plan(method: Method, model: nn.Module, layers: Mapping[str, BaseLayer], probe: Probe) -> Plan:
    """The method's plan for these layers, the first process's on all.

    Raises:
        PluginError: it names a layer that is not matched.
    """
    planner = _innermost(method, "plan")
    if type(planner).plan is Method.plan:
        return {}

    def make() -> Plan:
        if values_follow(model) and not planner.plans_by_shape:  # nothing to read: a model that is only measured
            return {}
        return cast(Plan, probe.remember(probe, "plan", answer, {}).plain)

    def answer() -> Answer:
        return Answer({path: dict(fields) for path, fields in method.plan(model, layers, probe).items()})

    plan = from_first(make)
    for path in plan:
        if path not in layers:
            raise PluginError(
                f"{type(method).__name__}.plan names {path}, which is none of the layers it was given."
                f"{did_you_mean(path, layers)}"
            )
    return plan


def planned_settings(
    method: Method, layers: Iterable[str], plan: Plan, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Method]:
    """The method of each layer as its plan says; a layer of rank 0 is left out unless an override gives it a rank.

    Raises:
        SettingsError: a field or value that the method cannot have, or that holds for the whole run.
        TargetError: no layer is left.
    """
    settings: dict[str, Method] = {}
    for path in layers:
        fields = plan.get(path, {})
        check_overridable(method, f"plan[{path}]", fields)
        if not _rank_is_zero(fields):
            settings[path] = replace(method, f"plan[{path}]", fields) if fields else method
        elif any(within(pattern, path) and _names_rank(given) for pattern, given in overrides.items()):
            settings[path] = replace(method, f"plan[{path}]", _without_rank(fields))
    if layers and not settings:
        raise TargetError(f"{type(method).__name__}.plan gives every layer rank 0, so nothing would be adapted.")
    return settings


def ask_start(method: Method, adapters: Mapping[str, Adapter], probe: Probe) -> None:
    """Let the method write start values from weights or data; the first process's on all."""
    if type(_innermost(method, "initialize")).initialize is Method.initialize:
        return

    modules = [*adapters.values(), *linked_modules(adapters.values())]

    def start() -> list[dict[str, Any]]:
        if values_follow(probe.model):
            return [{} for _ in modules]
        found = probe.remember(probe, "start", answer, tensors()).tensors
        return [{key: found[f"{number}.{key}"] for key in module.state_dict()} for number, module in enumerate(modules)]

    def answer() -> Answer:
        method.initialize(adapters, probe)
        return Answer(tensors=tensors())

    def tensors() -> dict[str, Tensor]:
        each = enumerate(modules)
        return {f"{number}.{key}": full_tensor(t).cpu() for number, m in each for key, t in m.state_dict().items()}

    for module, values in zip(modules, from_first(start), strict=True):
        own = module.state_dict(keep_vars=True)
        for key, value in values.items():
            put(own[key], value)


def _innermost(method: Method, question: str) -> Method:
    """The method that answers a question: wrappers hand it on to the one inside, unless they have an answer."""
    while isinstance(method, WrapperMethod) and getattr(type(method), question) is getattr(WrapperMethod, question):
        method = method.inner
    return method


def _rank_is_zero(fields: Mapping[str, Any]) -> bool:
    """Whether the fields, or those of a method inside, say rank 0."""
    return any(
        _rank_is_zero(value) if isinstance(value, Mapping) else name == "rank" and value == 0
        for name, value in fields.items()
    )


def _names_rank(fields: Mapping[str, Any]) -> bool:
    return any(name == "rank" or (isinstance(value, Mapping) and _names_rank(value)) for name, value in fields.items())


def _without_rank(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in fields.items():
        if name != "rank":
            found[name] = _without_rank(value) if isinstance(value, Mapping) else value
    return found
