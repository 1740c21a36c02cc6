"""What of a model follows the size of its vocabulary: matrices, biases, buffers, and numbers in its configuration.

transformers knows it: a copy of the model without values is resized by it, and what has changed there follows. To that
come embeddings that transformers forgets: those of the input's name and size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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
    unresized: tuple[str, ...] = ()
    """Those of `layers` that transformers' `resize_token_embeddings` leaves as they are, or cannot resize."""


def following(model: nn.Module) -> Following:
    """What of a plain Hugging Face model follows the size of its vocabulary.

    Raises:
        ModelError: the model has no embedding of tokens, or something follows that cannot be given rows.
    """
    embedding = token_embedding(model)
    weight, output = embedding.weight, model.get_output_embeddings()  # type: ignore[operator]  # of transformers' models
    if isinstance(output, nn.Embedding):  # FSMT, whose scores another layer makes
        _refuse(model, "an output layer that it does not name, and", output.weight)
    found = _resized(model)
    names = {f"{path}.weight" for path in _sharing(model, weight)} if found is None else set(found.tensors)
    names |= _forgotten(model, len(weight))
    shared = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    layers, buffers = {}, {}
    biases = {id(bias) for module in model.modules() if _is_matrix(module) for bias in [_bias(module)]}
    for path, module in model.named_modules():
        if _is_matrix(module) and (join(path, "weight") in names or id(module._parameters["weight"]) in shared):
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
    for path, layer in layers.items():
        if layer.weight.shape[0] != len(weight):
            _refuse(model, f"{path}.weight", layer.weight)
    numbers = _numbers(model, len(weight)) + (found.numbers if found else [])
    for holder, name in numbers:
        if getattr(holder, name) < len(weight):
            raise ModelError(
                f"{type(model).__name__} has {len(weight)} rows for a {name} of {getattr(holder, name)}, and nothing "
                "says what the others are for, so new tokens have no place. Leave new_tokens out, and write the texts "
                "in tokens that it knows."
            )
    resized = found.tensors if found else ()
    unresized = tuple(path for path in layers if join(path, "weight") not in resized)
    return Following(embedding, layers, buffers, numbers, unresized)


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
        f"{type(model).__name__} keeps {name} {tuple(tensor.shape)} for its tokens, where new ones have no entry. "
        "Leave new_tokens out, and write the texts in tokens that it knows."
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
    return found | set(_beside_output(model, rows))


def _beside_output(model: Any, rows: int) -> Iterator[str]:
    """Names of biases that the owner of the output layer adds to what that layer gives, as ESM does."""
    output = model.get_output_embeddings()
    for path, module in model.named_modules():
        if output is not None and any(child is output for child in module.children()):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.shape == (rows,):
                    yield join(path, name)


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
        for name in ("_get_resized_embeddings", "_get_resized_lm_head"):
            setattr(skeleton, name, _without_means(getattr(skeleton, name)))
        skeleton.resize_token_embeddings(size)
    except NotImplementedError as error:
        raise ModelError(
            f"{type(model).__name__} takes no new tokens, since transformers does not resize it: "
            f"{' '.join(str(error).split())}"
        ) from error
    except Exception:  # a model's own code, run on tensors without values
        return None
    tensors = {name for name, shape in _shapes(skeleton).items() if shape != before.get(name)}
    numbers = [pair for own, theirs in _configs(model.config, skeleton.config) for pair in _changed(own, theirs)]
    return _Resized(tensors, numbers)


def _without_means(resize: Callable[..., Any]) -> Callable[..., Any]:
    """Means cannot be taken without values, and not every class hands on that none are wanted."""

    def resized(old: nn.Module, new_num_tokens: int | None = None, *_: Any, **options: Any) -> Any:
        return resize(old, new_num_tokens, **{**options, "mean_resizing": False})

    return resized


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


def _numbers(model: Any, rows: int) -> list[tuple[Any, str]]:
    """Sizes of the vocabulary in the model itself and in configurations inside its own, and in that of its text."""
    text = model.config.get_text_config()
    found = [(text, "vocab_size")] if "vocab_size" in vars(text) else []
    for holder in (model, *(inner for inner, _ in _configs(model.config, model.config))):
        own = vars(holder)
        found += [(holder, name) for name in own if name.endswith("vocab_size") and own[name] == rows]
    return found
