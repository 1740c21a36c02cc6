"""Heads and output layers of Hugging Face models."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.models.paths import inside, join, plain, segments


def head_prefixes(pretrained: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of task heads: what lies outside the backbone of a Hugging Face model, and poolers that it reads.

    A path is a module's, or a single parameter's of the task model itself. A language model's output layer is
    pretrained, so a language model has no head in this sense.

    Args:
        pretrained: Hugging Face models by path.
        modules: every module of the whole model by path.
    """
    prefixes: list[str] = []
    for path, hf_model in pretrained.items():
        if output_embeddings(hf_model) is not None:
            continue
        outside = outside_backbone(hf_model)
        heads = [name for name, child in outside.items() if next(child.parameters(), None) is not None]
        if heads:
            heads += [name for name, _ in hf_model.named_parameters(recurse=False)]
        else:
            heads = _following_labels(hf_model)
        prefixes += [join(path, name) for name in heads]
        model_class: Any = type(hf_model)  # a class is hashable, which mypy doubts of module classes
        if heads and _reads_pooled(model_class):
            prefixes += [name for name in modules if inside(name, path) and segments(name)[-1] == "pooler"]
    return prefixes


@functools.cache
def _reads_pooled(model_class: Any) -> bool:
    """Whether a task model computes with what its backbone has pooled; a pooler that it does not is no head of it."""
    try:
        source = inspect.getsource(inspect.unwrap(model_class.forward))
    except (OSError, TypeError):  # typed into an interpreter, or generated
        return True
    return re.search(r"pool|outputs?\[1\]|encoded_layers", source) is not None


def outside_backbone(hf_model: nn.Module) -> dict[str, nn.Module]:
    """Children of a Hugging Face model beside its backbone, by name; none where it is a backbone itself."""
    backbone = cast(str, hf_model.base_model_prefix)
    if not hasattr(hf_model, backbone):
        return {}
    return {name: child for name, child in hf_model.named_children() if name != backbone}


def _following_labels(hf_model: Any) -> list[str]:
    """Heads of a model whose class does not say where its backbone is, or keeps its head inside it.

    They are the largest modules around a tensor whose shape follows the number of labels, with nothing of the
    architecture's bare model in them. Both are asked of models without values.
    """
    from transformers import MODEL_MAPPING

    config: Any = getattr(hf_model, "config", None)
    if getattr(config, "num_labels", None) is None:
        return []
    bare = MODEL_MAPPING.get(type(config), None)
    if type(hf_model) in (bare if isinstance(bare, tuple) else (bare,)):
        return []
    more = copy.deepcopy(config)
    more.num_labels = config.num_labels + 1
    try:
        other = _shapes(type(hf_model), more)
    except Exception:  # a model's own constructor, which may want more than its configuration
        return []
    own = {plain(name): tuple(parameter.shape) for name, parameter in hf_model.named_parameters()}
    labelled = [name for name, shape in own.items() if other.get(name, shape) != shape]
    if not labelled:
        return []
    known = _bare_names(bare, config)
    return list(dict.fromkeys(_largest_without(name, own, known) for name in labelled))


def _largest_without(name: str, names: Iterable[str], known: set[str]) -> str:
    """The largest module around a tensor with none of the `known` ones in it; the tensor's own where none are known."""
    path = name.rpartition(".")[0] or name
    while known and (parent := path.rpartition(".")[0]):
        if any(own in known for own in names if inside(own, parent)):
            break
        path = parent
    return path


def _bare_names(bare: Any, config: Any) -> set[str]:
    """Names of the bare model's parameters in a task model, with the prefix that it may have there and without."""
    if bare is None:
        return set()
    try:
        names = _shapes(bare[0] if isinstance(bare, tuple) else bare, config)
    except Exception:  # as above
        return set()
    prefix = (bare[0] if isinstance(bare, tuple) else bare).base_model_prefix
    return {*names, *(join(prefix, name) for name in names)}


def _shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in model_class(copy.deepcopy(config)).named_parameters()}


def output_layers(pretrained: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the output layers of language models; arguments as in `head_prefixes`."""
    outputs = {id(output_embeddings(hf_model)) for hf_model in pretrained.values()} - {id(None)}
    return [path for path, module in modules.items() if id(module) in outputs]


def output_embeddings(hf_model: nn.Module) -> nn.Module | None:
    """The output layer of a Hugging Face language model; None in other models."""
    getter = getattr(hf_model, "get_output_embeddings", None)
    return cast("nn.Module | None", getter() if getter else None)


def classes_hint(model: nn.Module, own: Tensor, value: Tensor) -> str:
    """What helps where a head's tensor has another number of classes than the model: a sentence, else nothing."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if not own.dim() or len(own) != classes or len(own) == len(value) or own.shape[1:] != value.shape[1:]:
        return ""
    return f" The adapter was trained for other classes: load the model with num_labels={len(value)}."
