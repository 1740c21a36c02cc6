"""Building adapters and putting them on their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter, trains
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import ExpertStack
from lora_lightning.adapters.linked import Linked
from lora_lightning.adapters.precision import compute_in_float32
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.gates import add_context_hooks
from lora_lightning.injection.heads import keep_base_heads, show_heads
from lora_lightning.injection.links import attach
from lora_lightning.injection.plan import built
from lora_lightning.injection.records import AdapterRecord, add_record, records, refuse_merged
from lora_lightning.injection.statistics import hold_statistics
from lora_lightning.injection.switches import activate, freeze, train_only
from lora_lightning.methods import Method
from lora_lightning.models import experts
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.meta import values_follow
from lora_lightning.seeds import generator


def check_ready(anatomy: Anatomy, name: str) -> None:
    """Raise `AdapterStateError` unless an adapter called `name` can be put into the model now."""
    model = anatomy.model
    if name in records(model):
        raise AdapterStateError(f'the model has an adapter "{name}" already; eject it or choose another name.')
    refuse_merged(anatomy.adapted)
    for path, module in anatomy.modules.items():
        _check_own(path, module, is_root=module is model)
    for parameter_name, parameter in anatomy.parameters.items():
        if isinstance(parameter, DTensor):
            raise AdapterStateError(
                "the model is sharded already; inject adapters before fully_shard, for instance in configure_model."
            )
        if parameter.is_meta and not values_follow(model):
            raise AdapterStateError(
                f"{parameter_name} is on the meta device, without a value; load the weights before injecting."
            )


def _check_own(path: str, module: nn.Module, is_root: bool) -> None:
    """Raise `AdapterStateError` for a module that has adapters of peft's, or of its own."""
    if type(module).__module__.startswith("peft."):
        raise AdapterStateError(
            f"{path or 'the model'} ({type(module).__name__}) is peft's, and its adapters would be frozen. Take "
            "its merge_and_unload() first, or save its adapter and read that with import_peft into the plain model."
        )
    if records(module) and not is_root:
        raise AdapterStateError(
            f"{path} ({type(module).__name__}) has adapters of its own; inject into that module, or eject them."
        )


def build_adapter(method: Method, path: str, base: BaseLayer, seed: int | None) -> Adapter:
    """The adapter for the layer at `path`, with its start values; without a seed, with none.

    Raises:
        SettingsError: the layer cannot have these settings, naming the layer.
    """
    try:
        adapter = built(method, base)
    except SettingsError as error:
        raise SettingsError(f"{type(method).__name__} on {path}: {error}") from error
    if seed is not None:
        adapter.reset(generator(seed, "init", 0, path))
    return adapter


def place_adapters(
    anatomy: Anatomy,
    name: str,
    adapters: Mapping[str, Adapter],
    record: AdapterRecord,
    base_layers: Mapping[str, BaseLayer],
    linked: Mapping[str, Linked],
    trainable: bool = True,
) -> dict[str, AdaptedLayer]:
    """Put built adapters on their layers, and what they share on its owners; they become the only active ones.

    With `trainable` they are the only ones that train; without, they are frozen and other adapters stay as they are.

    Returns:
        Every adapted layer of the model by path, those that the survey does not know yet included.
    """
    trained_before = _trainable_names(anatomy)
    ties = anatomy.tied(base_layers)
    layers = dict(anatomy.adapted)
    for path, adapter in adapters.items():
        if path not in layers:
            layers[path] = _put_layer(anatomy, path, base_layers[path])
        layer = layers[path]
        layer.tied_to = ties.get(path, ())
        layer.add(name, adapter.train(layer.training))
    attach(anatomy.model, name, linked)
    if any(adapter.reads_context for adapter in adapters.values()):
        add_context_hooks(anatomy.model)
    hold_statistics(anatomy)
    freeze(anatomy.parameters.values())  # before some are replaced by copies in float32
    compute_in_float32(_owners(anatomy, record.trained))
    add_record(anatomy.model, name, record)
    activate(layers.values(), [name])
    keep_base_heads(anatomy.model, record.trained)
    show_heads(anatomy.model, [name], trained=())  # what trains is decided next
    train_only(anatomy.model, layers.values(), [name] if trainable else trained_before)
    return layers


def _owners(anatomy: Anatomy, trained: Iterable[str]) -> dict[nn.Module, None]:
    """Modules that hold the parameters of these names, all of them where one is shared."""
    names = [name for first in trained for name in anatomy.users[id(anatomy.parameters[first])]]
    return {anatomy.modules[name.rpartition(".")[0]]: None for name in names}


def _put_layer(anatomy: Anatomy, path: str, base: BaseLayer) -> AdaptedLayer:
    """An adapted layer without adapters, in every place of the layer that it is made of."""
    layer = AdaptedLayer(base)
    standing = anatomy.places.get(id(layer.base))
    if standing is None:  # a stack of experts is no module yet: its parameter stands in one place
        owner, _, leaf = path.rpartition(".")
        standing = [(anatomy.modules[owner], leaf)]
        layer.train(anatomy.modules[owner].training)
    else:
        layer.train(layer.base.training)
    set_module(standing, layer)
    return layer


def _trainable_names(anatomy: Anatomy) -> list[str]:
    """Adapters of which a parameter trains."""
    found = []
    for name in records(anatomy.model):
        own = [layer.adapter(name) for layer in anatomy.adapted.values() if name in layer.adapters]
        if any(trains(adapter) for adapter in own):
            found.append(name)
    return found


def set_module(where: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Set `module` at every (parent, name), so that a layer used in several places is adapted in all of them."""
    for parent, name in where:
        if not experts.stands_for_parameter(module):
            setattr(parent, name, module)
        elif isinstance(module, AdaptedLayer):
            experts.install(parent, name, module)
        else:
            experts.restore(parent, name, cast(ExpertStack, module))
