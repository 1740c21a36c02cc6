"""Building adapters and putting them on their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from torch import nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter, trains
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import ExpertStack
from lora_lightning.adapters.precision import compute_in_float32
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.methods import Method
from lora_lightning.models import experts
from lora_lightning.models.anatomy import other_users
from lora_lightning.models.paths import places
from lora_lightning.seeds import generator

if TYPE_CHECKING:
    pass
from lora_lightning.injection.records import (
    AdapterRecord,
    adapters_named,
    add_record,
    check_unmerged,
    iter_adapters,
    records,
)
from lora_lightning.injection.switches import set_active, set_trainable
from lora_lightning.models.meta import values_follow


def check_ready(model: nn.Module, name: str) -> None:
    """Raise `AdapterStateError` unless an adapter called `name` can be put into `model` now."""
    if name in records(model):
        raise AdapterStateError(f'the model has an adapter "{name}" already; eject it or choose another name.')
    check_unmerged(model)
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise AdapterStateError(
                f"{path or 'the model'} ({type(module).__name__}) is peft's, and its adapters would be frozen. Take "
                "its merge_and_unload() first, or save its adapter and read that with import_peft into the plain model."
            )
        if records(module) and module is not model:
            raise AdapterStateError(
                f"{path} ({type(module).__name__}) has adapters of its own; inject into that module, or eject them."
            )
    for parameter_name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise AdapterStateError(
                "the model is sharded already; inject adapters before fully_shard, for instance in configure_model."
            )
        if parameter.is_meta and not values_follow(model):
            raise AdapterStateError(
                f"{parameter_name} is on the meta device, without a value; load the weights before injecting."
            )


def build_adapter(method: Method, path: str, base: BaseLayer, seed: int) -> Adapter:
    """The adapter for the layer at `path`, with its start values.

    Raises:
        SettingsError: the layer cannot have these settings, naming the layer.
    """
    try:
        adapter = method.build(base)
    except SettingsError as error:
        raise SettingsError(f"{type(method).__name__} on {path}: {error}") from error
    adapter.reset(generator(seed, "init", 0, path))
    return adapter


def place_adapters(
    model: nn.Module,
    name: str,
    adapters: Mapping[str, Adapter],
    record: AdapterRecord,
    base_layers: Mapping[str, BaseLayer],
    trainable: bool = True,
) -> None:
    """Put built adapters on their layers and make them the only active ones.

    With `trainable` they are the only ones that train; without, they are frozen and other adapters stay as they are.
    """
    trained_before = _trainable_names(model)
    where, ties = places(model), other_users(model, base_layers)
    layers = dict(iter_adapters(model))
    for path, adapter in adapters.items():
        layer = layers.get(path)
        if layer is None:
            layer = AdaptedLayer(base_layers[path])
            owner, _, leaf = path.rpartition(".")
            # a stack of experts is no module yet: its parameter stands in one place
            standing = where.get(id(layer.base)) or [(model.get_submodule(owner), leaf)]
            layer.train(layer.base.training if id(layer.base) in where else standing[0][0].training)
            set_module(standing, layer)
        layer.tied_to = ties.get(path, ())
        layer.add(name, adapter.train(layer.training))
    compute_in_float32({model.get_submodule(parameter.rpartition(".")[0]): None for parameter in record.trained})
    add_record(model, name, record)
    set_active(model, [name])
    set_trainable(model, [name] if trainable else trained_before)


def _trainable_names(model: nn.Module) -> list[str]:
    return [name for name in records(model) if any(trains(adapter) for adapter in adapters_named(model, name).values())]


def set_module(where: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Set `module` at every (parent, name), so that a layer used in several places is adapted in all of them."""
    for parent, name in where:
        if not experts.stands_for_parameter(module):
            setattr(parent, name, module)
        elif isinstance(module, AdaptedLayer):
            experts.install(parent, name, module)
        else:
            experts.restore(parent, name, cast(ExpertStack, module))
