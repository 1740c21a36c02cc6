"""What was injected: the record of each adapter, kept on the model, and the walks over adapted layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.linked import Linked
from lora_lightning.errors import AdapterStateError, did_you_mean
from lora_lightning.methods import Method, Plan
from lora_lightning.models.token_rows import TokenRows

_RECORDS = "_lora_lightning_records"
_TRAINED = "_lora_lightning_trained"


@dataclass(frozen=True)
class Below:
    """An adapter that another one was trained on top of, frozen."""

    name: str
    """Its name in the model."""
    digest: str
    """What tells it from every other one: the digest of its files."""
    source: str
    """Where it lay, as it was given."""


@dataclass(frozen=True)
class AdapterRecord:
    """What was injected under one adapter name; kept on the model, written into the adapter file."""

    method: Method
    layers: dict[str, Method]
    """Settings by layer path, overrides applied."""
    trained: tuple[str, ...]
    """Fully trained base parameters, by name."""
    seed: int
    plan: Plan = field(default_factory=dict)
    """What the method itself has set for some layers, by path."""
    linked: tuple[str, ...] = ()
    """Owners of modules above one layer, by path; each holds this adapter's at `<owner>.adapters.<name>`."""
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    """Known tokens whose rows train, by the path of the layer."""
    below: tuple[Below, ...] = ()
    """Adapters that this one was trained on top of, in their order."""
    digest: str | None = field(default=None, compare=False)
    """The digest of the files that it was read from; None once it trains, or where it was never read."""


def records(model: nn.Module) -> dict[str, AdapterRecord]:
    """Adapters injected into exactly this module, by name."""
    return cast("dict[str, AdapterRecord]", model.__dict__.get(_RECORDS, {}))


def note_trained(model: nn.Module, names: Sequence[str]) -> None:
    """Note on `model` which adapters are meant to train; these are no longer what their files say."""
    model.__dict__[_TRAINED] = tuple(names)
    for name in names:
        records(model)[name] = replace(records(model)[name], digest=None)


def meant_to_train(model: nn.Module) -> tuple[str, ...]:
    """Adapters of exactly this module that `inject` or `set_trainable` has let train, whoever froze them since."""
    return tuple(name for name in model.__dict__.get(_TRAINED, ()) if name in records(model))


def add_record(model: nn.Module, name: str, record: AdapterRecord) -> None:
    """Note on `model` what was injected under `name`."""
    model.__dict__.setdefault(_RECORDS, {})[name] = record


def note_read(model: nn.Module, name: str, digest: str) -> None:
    """Note which files an adapter of exactly this module was read from, unless it trains."""
    if name not in meant_to_train(model):
        records(model)[name] = replace(records(model)[name], digest=digest)


def stand_on(model: nn.Module, name: str, below: Sequence[Below]) -> None:
    """Note which adapters of exactly this module another one of it is trained on top of."""
    records(model)[name] = replace(records(model)[name], below=tuple(below))


def stack_of(model: nn.Module, name: str) -> tuple[str, ...]:
    """An adapter of exactly this module, behind those that it was trained on top of: what is active when it is used."""
    return (*(one.name for one in records(model)[name].below), name)


def trained_in(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Parameters that one of these adapters of exactly this module trains in full."""
    return list(dict.fromkeys(parameter for name in names for parameter in records(model)[name].trained))


def injected_root(model: nn.Module) -> nn.Module:
    """The module that `inject` was called with: `model` or the one inside it.

    Raises:
        AdapterStateError: nothing was injected.
    """
    return find_root(model)[1]


def injected_roots(module: nn.Module) -> list[nn.Module]:
    """Every module inside, or itself, that `inject` or `load_adapter` was called with."""
    return [part for part in module.modules() if records(part)]


def find_root(model: nn.Module) -> tuple[str, nn.Module]:
    """As `injected_root`, with the module's path in `model`."""
    if records(model):
        return "", model
    for path, module in model.named_modules():
        if records(module):
            return path, module
    raise AdapterStateError(f"{type(model).__name__} has no adapters; call inject or load_adapter first.")


def check_unmerged(model: nn.Module) -> None:
    """Raise `AdapterStateError` if an adapter is merged, and so another could not be added or replaced."""
    refuse_merged(dict(iter_adapters(model)))


def refuse_merged(layers: Mapping[str, AdaptedLayer]) -> None:
    """As `check_unmerged`, for layers by path."""
    for path, layer in layers.items():
        if layer.merged:
            raise AdapterStateError(f"{path}: {', '.join(layer.merged)} is merged; {layer.merging.way_out}")


def iter_adapters(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Paths and adapted layers; one that stands in several places comes once."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Adapters of one name by layer path."""
    return {path: layer.adapter(name) for path, layer in iter_adapters(model) if name in layer.adapters}


def linked_named(model: nn.Module, name: str) -> dict[str, Linked]:
    """What adapters of one name share, by the path of the module that owns it."""
    owners = records(model)[name].linked
    return {path: cast(Linked, cast(Any, model.get_submodule(path)).adapters[name]) for path in owners}


def trainable_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Adapters with a trainable parameter, by their own module path."""
    return {
        f"{path}.adapters.{name}": cast(Adapter, adapter)
        for path, layer in iter_adapters(model)
        for name, adapter in layer.adapters.items()
        if any(p.requires_grad for p in adapter.parameters())
    }


def check_known(root: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """`names` as a tuple; raises `AdapterStateError` for one that was never injected into `root`."""
    known = records(root)
    for name in names:
        if name not in known:
            raise AdapterStateError(f'no adapter "{name}".{did_you_mean(name, known)} Installed: {", ".join(known)}.')
    return tuple(names)
