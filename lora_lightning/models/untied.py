"""An output layer that shares the embedding's weight, given its own: both can then be adapted, trained and merged.

The copy starts as the weight that was shared, so the model computes the same. Its configuration says so, and
`save_pretrained` and `from_pretrained` keep the two apart. As a base model it counts as the tied one that it was.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lora_lightning.errors import AdapterStateError, ModelError
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.heads import output_embeddings
from lora_lightning.models.new_tokens import ExtendedLayer
from lora_lightning.models.paths import plain

_KEY = "_lora_lightning_untied"
_FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied:
    """What `untie` has changed."""

    output: str
    """Path of the output layer, from the module that was surveyed."""
    embedding: str
    """Path of the embedding that it shared its weight with."""
    host: str
    """Path of the Hugging Face model."""
    flags: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    """What the configuration, and those inside it, said."""
    tied: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Names of tied tensors, as the Hugging Face model lists them."""

    @property
    def weight(self) -> str:
        """Plain name of the output layer's weight."""
        return plain(f"{self.output}.weight")


def untied(model: nn.Module) -> Untied | None:
    """What `untie` has changed in exactly this model; None for nothing."""
    return cast("Untied | None", model.__dict__.get(_KEY))


def untie(anatomy: Anatomy) -> Untied:
    """Give the output layer of a language model a weight of its own, a copy of the one it shares; its new rows too.

    Raises:
        ModelError: it shares none with the embedding alone, or the model's code computes otherwise without.
        AdapterStateError: the model has adapters, or rows of known tokens.
    """
    found, output, embedding = _find(anatomy)
    if anatomy.adapted:
        raise AdapterStateError(
            "untie: the model has adapters already, which know its weight as shared; eject them first, or untie with "
            "the first one."
        )
    _plain(output).weight = _copied(_plain(embedding).weight)
    if isinstance(output, ExtendedLayer) and output.new_rows is not None:
        output.new_rows = _copied(output.new_rows)
    host: Any = anatomy.modules[found.host]
    for one in _configs(host.config):
        setattr(one, _FLAG, False)
    host.all_tied_weights_keys = {}
    anatomy.model.__dict__[_KEY] = found
    return found


def retie(model: nn.Module, trained: Collection[str] = ()) -> None:
    """Let the output layer share the embedding's weight again, and its new rows; does nothing where `untie` did not.

    Args:
        model: the module that was untied.
        trained: plain names of tensors that are the base model's no more. Of the two weights the other one is shared.
    """
    found = untied(model)
    if found is None:
        return
    output, embedding = model.get_submodule(found.output), model.get_submodule(found.embedding)
    if plain(f"{found.embedding}.weight") in trained:
        _plain(embedding).weight = _plain(output).weight
    _plain(output).weight = _plain(embedding).weight
    if isinstance(output, ExtendedLayer) and isinstance(embedding, ExtendedLayer):
        output.new_rows = embedding.new_rows
    say_tied(model.get_submodule(found.host), found)
    forget_untied(model)


def say_tied(host: Any, found: Untied) -> None:
    """Let the configuration of a model, or of a copy of it, say again what it said before `untie`."""
    for config, flag in zip(_configs(host.config), found.flags, strict=True):
        setattr(config, _FLAG, flag)
    host.all_tied_weights_keys = dict(found.tied)


def forget_untied(model: nn.Module) -> None:
    """Take the model as it is for one that was never tied, as after a merge for good."""
    model.__dict__.pop(_KEY, None)


@contextmanager
def apart(anatomy: Anatomy, wanted: bool) -> Iterator[Anatomy]:
    """The model with an output layer of its own, if that is wanted and it is not so; on an error tied again."""
    if not wanted or untied(anatomy.model) is not None:
        yield anatomy
        return
    untie(anatomy)
    try:
        yield survey(anatomy.model)
    except BaseException:
        retie(anatomy.model)
        raise


def untied_note(model: nn.Module) -> list[str]:
    """For people: that the output layer has a weight of its own."""
    found = untied(model)
    if found is None:
        return []
    size = _plain(model.get_submodule(found.output)).get_parameter("weight").numel()
    return [
        f"untied: {plain(found.output)} has a weight of its own, {size:,} numbers, no more {plain(found.embedding)}'s"
    ]


def _find(anatomy: Anatomy) -> tuple[Untied, nn.Module, nn.Module]:
    """What is to be untied, with the output layer and the embedding."""
    names = {id(module): path for path, module in anatomy.modules.items()}
    for path, host in anatomy.pretrained.items():
        output = output_embeddings(host)
        if output is None:
            continue
        embedding = cast(nn.Module, cast(Any, host).get_input_embeddings())
        if _plain(output).weight is not _plain(embedding).weight:
            continue
        _check_alone(anatomy, host, output, embedding)
        flags = tuple(getattr(one, _FLAG) for one in _configs(cast(Any, host).config))
        tied = dict(cast(Any, host).all_tied_weights_keys)
        return Untied(names[id(output)], names[id(embedding)], path, flags, tied), output, embedding
    raise ModelError(
        f"untie: no output layer of {type(anatomy.model).__name__} shares the embedding's weight, so there is nothing "
        "to untie; leave it out."
    )


def _configs(config: Any) -> list[Any]:
    """A model's configuration and those inside it, as far as they say whether weights are tied."""
    inside = (inner for inner in vars(config).values() if hasattr(inner, "get_text_config"))
    return [one for one in (config, *inside) if hasattr(one, _FLAG)]


def _plain(layer: Any) -> Any:
    return layer.base if isinstance(layer, ExtendedLayer) else layer


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _check_alone(anatomy: Anatomy, host: Any, output: nn.Module, embedding: nn.Module) -> None:
    """Raise `ModelError` where more is tied than these two, or the model's code asks whether they are."""
    weight = _plain(embedding).weight
    others = [path for path in anatomy.users[id(weight)].values() if anatomy.modules[path] not in (output, embedding)]
    others += [name for name in host.all_tied_weights_keys if not name.endswith(".weight")]
    if others or not isinstance(_plain(output), nn.Linear) or not weight.is_floating_point():
        what = f"{plain(others[0])} is tied as well" if others else "its output layer is no plain linear layer"
        raise ModelError(
            f"untie: {type(host).__name__} cannot be untied here: {what}. Keep the adapter unmerged, and export it "
            'with format="peft".'
        )
    before, config = host.config.to_dict(), copy.deepcopy(host.config)
    after = type(config)(**{**before, _FLAG: False}).to_dict()
    differing = [key for key, value in after.items() if key != _FLAG and before.get(key) != value and key in before]
    if differing or _reads_flag(type(host)):
        raise ModelError(
            f"untie: {type(host).__name__} computes its scores otherwise where its weights are not tied. Keep the "
            'adapter unmerged, and export it with format="peft".'
        )


def _reads_flag(model_class: Any) -> bool:
    try:
        return re.search(_FLAG, inspect.getsource(inspect.unwrap(model_class.forward))) is not None
    except (OSError, TypeError):  # typed into an interpreter, or generated
        return False
