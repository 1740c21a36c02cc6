"""A method's own settings for some layers, and start values from data: asked once, of the first process.

Of one field of one layer the user's `overrides` win, then the method's plan, then the method's field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, linked_modules
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.distributed import from_first, full_tensor, put
from lora_lightning.errors import PluginError, SettingsError, TargetError, did_you_mean
from lora_lightning.injection.answers import Answer
from lora_lightning.injection.probe import Probe
from lora_lightning.methods import Method, Plan, WrapperMethod, check_overridable, replace
from lora_lightning.models.meta import values_follow
from lora_lightning.models.paths import within
from lora_lightning.start_values import Start

SKIPPED = "rank 0 in the method's plan"


def start_of(method: Method) -> Start | None:
    """The start that a method, or the one inside it, is given."""
    while isinstance(method, WrapperMethod):
        method = method.inner
    start: Start | None = getattr(method, "init", None)
    return start


def built(method: Method, base: BaseLayer) -> Adapter:
    """The method's adapter for one layer, with room for the start that it is given.

    Raises:
        SettingsError: settings that the layer cannot have, or an adapter that takes no start.
    """
    adapter = method.build(base)
    if (start := start_of(method)) is not None:
        if not (isinstance(adapter, PairAdapter) and adapter.takes_start):
            raise SettingsError(
                f"init is {type(start).__name__}, and {type(adapter).__name__} is not made of one pair of factors that "
                "could start there; leave init out."
            )
        if start.subtracts:
            adapter.hold_start()
    return adapter


def batches_read(method: Method) -> int:
    """How many calibration batches the method, or the start that it is given, reads."""
    start = start_of(method)
    return max(method.probe_batches(), 0 if start is None else start.probe_batches())


def ask_plan(method: Method, model: nn.Module, layers: Mapping[str, BaseLayer], probe: Probe) -> Plan:
    """The plan of the method, and of the start that it is given, for these layers; the first process's on all.

    Raises:
        PluginError: it names a layer that is not matched.
    """
    start, planner = start_of(method), _innermost(method, "plan")
    starts_plan = start is not None and type(start).plan is not Start.plan
    if type(planner).plan is Method.plan and not starts_plan:
        return {}

    def make() -> Plan:
        if values_follow(model) and not planner.plans_by_shape:  # nothing to read: a model that is only measured
            return {}
        return cast(Plan, probe.remember(probe, "plan", answer, {}).plain)

    def answer() -> Answer:
        own = method.plan(model, layers, probe)
        given = {} if start is None else _nested(method, start.plan, layers, probe)
        return Answer({path: {**given.get(path, {}), **own.get(path, {})} for path in dict.fromkeys([*given, *own])})

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
    """Let the start that the method is given, and the method, write start values; the first process's on all."""
    start_given = start_of(method)
    if type(_innermost(method, "initialize")).initialize is Method.initialize and start_given is None:
        return

    modules = [*adapters.values(), *linked_modules(adapters.values())]

    def start() -> list[dict[str, Any]]:
        if values_follow(probe.model):
            return [{} for _ in modules]
        found = probe.remember(probe, "start", answer, tensors()).tensors
        return [{key: found[f"{number}.{key}"] for key in module.state_dict()} for number, module in enumerate(modules)]

    def answer() -> Answer:
        if start_given is not None:
            _write_start(start_given, adapters, probe)
        method.initialize(adapters, probe)
        return Answer(tensors=tensors())

    def tensors() -> dict[str, Tensor]:
        each = enumerate(modules)
        return {f"{number}.{key}": full_tensor(t).cpu() for number, m in each for key, t in m.state_dict().items()}

    for module, values in zip(modules, from_first(start), strict=True):
        own = module.state_dict(keep_vars=True)
        for key, value in values.items():
            put(own[key], value)


def _nested(method: Method, plan: Callable[..., Plan], layers: Mapping[str, BaseLayer], probe: Probe) -> Plan:
    """A plan of fields of the method inside, as fields of the one around it."""
    if isinstance(method, WrapperMethod):
        return {path: {"inner": fields} for path, fields in _nested(method.inner, plan, layers, probe).items()}
    return plan(method, layers, probe)


def _write_start(start: Start, adapters: Mapping[str, Adapter], probe: Probe) -> None:
    """Give each adapter the factors where it starts.

    Raises:
        PluginError: the start names none for an adapter.
    """
    pairs = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, PairAdapter)}
    left = set(adapters)
    for path, factors in start.factors(pairs, probe):
        pairs[path].start_at(factors)
        left.discard(path)
    if left:
        raise PluginError(f"{type(start).__name__}.factors gives no start for {min(left)}.")


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
