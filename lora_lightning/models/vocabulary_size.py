"""What of a model follows the size of its vocabulary: matrices, biases, buffers, and numbers in its configuration.

transformers knows it: a copy of the model without values is resized by it, and what has changed there follows. To that
come embeddings that transformers forgets: those of the input's name and size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ModelError
from lora_lightning.models.paths import join, segments


@dataclass(frozen=True)
class Following:
    """What has a size of its own for each token."""

    embedding: nn.Embedding
    """That of the input."""
    layers: dict[str, nn.Module]
    """Embeddings and output layers, by path."""
    buffers: dict[str, Tensor]
    """Biases that are no parameters, (..., vocabulary), by name."""
    numbers: list[tuple[Any, str]] = field(default_factory=list)
    """Objects that hold the size, each with the attribute's name: the model and its configurations."""


def following(model: nn.Module) -> Following:
    """What of a plain Hugging Face model follows the size of its vocabulary.

    Raises:
        ModelError: the model has no embedding of tokens, or something follows that cannot be given rows.
    """
    embedding = token_embedding(model)
    weight = embedding.weight
    found = _resized(model)
    names = {f"{path}.weight" for path in _sharing(model, weight)} if found is None else set(found.tensors)
    names |= _forgotten(model, len(weight))
    layers, buffers = {}, {}
    biases = {id(bias) for module in model.modules() if _is_matrix(module) for bias in [_bias(module)]}
    for path, module in model.named_modules():
        if _is_matrix(module) and join(path, "weight") in names:
            layers[path] = module
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if join(path, name) in names and id(parameter) not in biases:
                _refuse(model, join(path, name), parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if join(path, name) in names:
                if not buffer.is_floating_point() or buffer.shape[-1] != len(weight):
                    _refuse(model, join(path, name), buffer)
                buffers[join(path, name)] = buffer
    return Following(embedding, layers, buffers, _numbers(model) if found is None else found.numbers)


def token_embedding(model: nn.Module) -> nn.Embedding:
    """The embedding of a model's tokens.

    Raises:
        ModelError: it has none, or none that is known.
    """
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        raise ModelError(f"{type(model).__name__} is no model of transformers, so its embedding is not known.")
    try:
        layer = getter()
    except (NotImplementedError, AttributeError):
        layer = None
    if not isinstance(layer, nn.Embedding):
        raise ModelError(
            f"{type(model).__name__} has no embedding with a row for each token, so it takes no new tokens. Leave "
            "new_tokens out, and write the texts in tokens that it knows."
        )
    return layer


def _refuse(model: nn.Module, name: str, tensor: Tensor) -> None:
    raise ModelError(
        f"{type(model).__name__} keeps {name} {tuple(tensor.shape)} for its tokens, outside its embedding and output "
        "layer, so new tokens would have no entry there. Leave new_tokens out, and write the texts in tokens that it "
        "knows."
    )


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.Linear)


def _bias(module: nn.Module) -> Tensor | None:
    return module._parameters.get("bias")


def _sharing(model: Any, weight: Any) -> Iterator[str]:
    """Paths of the embedding, the output layer, and what shares their weights."""
    output = model.get_output_embeddings()
    weights = {id(weight), id(getattr(output, "weight", weight))}
    for path, module in model.named_modules():
        if _is_matrix(module) and id(module._parameters.get("weight")) in weights:
            yield path


def _forgotten(model: nn.Module, rows: int) -> set[str]:
    """Names of tensors with a row for each token that transformers does not resize."""
    own = token_embedding(model)
    leaves = {segments(path)[-1] for path, module in model.named_modules() if module is own}
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == rows and segments(path)[-1] in leaves:
            found.add(f"{path}.weight")
        found |= {
            join(path, name)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.dim() > 1 and len(buffer) == rows and not buffer.is_floating_point()
        }
    return found


# -- the copy that transformers resizes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resized:
    tensors: set[str]
    numbers: list[tuple[Any, str]]


def _resized(model: Any) -> _Resized | None:
    """What changes when transformers resizes a copy of the model; None where it cannot."""
    try:
        skeleton = _without_values(model)
        before = _shapes(skeleton)
        size = len(token_embedding(skeleton).weight) + 1
        try:
            skeleton.resize_token_embeddings(size, mean_resizing=False)
        except TypeError:  # older classes take the size only
            skeleton.resize_token_embeddings(size)
    except Exception:  # a model's own code, run on tensors without values
        return None
    tensors = {name for name, shape in _shapes(skeleton).items() if shape != before.get(name)}
    numbers = [pair for own, theirs in _configs(model.config, skeleton.config) for pair in _changed(own, theirs)]
    return _Resized(tensors, numbers + _own_number(model, size - 1))


def _without_values(model: nn.Module) -> Any:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _configs(own: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    """Two configurations of one kind, and those inside them, side by side."""
    yield own, theirs
    for name, inner in vars(own).items():
        if hasattr(inner, "get_text_config") and name in vars(theirs):
            yield from _configs(inner, vars(theirs)[name])


def _changed(own: Any, theirs: Any) -> Iterator[tuple[Any, str]]:
    for name, value in vars(own).items():
        if isinstance(value, int) and vars(theirs).get(name, value) != value:
            yield own, name


def _own_number(model: Any, rows: int) -> list[tuple[Any, str]]:
    return [(model, "vocab_size")] if model.__dict__.get("vocab_size") == rows else []


def _numbers(model: Any) -> list[tuple[Any, str]]:
    config = model.config.get_text_config()
    known = [(config, "vocab_size")] if "vocab_size" in vars(config) else []
    return known + _own_number(model, len(token_embedding(model).weight))
