"""Tensors of a folder in peft's format that replace parameters of the model: heads, and biases that trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, did_you_mean
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.source import plain_modules, users
from lora_lightning.injection.records import records
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.heads import classes_hint
from lora_lightning.models.paths import join

TRAINED_BIASES = ("all", "lora_only")
"""Values of `bias` with which peft trains biases of the base model."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names they have in the plain model, each under all of its names."""
    return tensors_in(plain_modules(model))


def tensors_in(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """As `tensors_of`, of a plain model's modules by path; placing adapters leaves these in place."""
    found: dict[str, Tensor] = {}
    for path, module in modules.items():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        found |= {join(path, key): t for key, t in own.items() if key not in module._non_persistent_buffers_set}
    return found


def same(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor of the file is the model's own, in its dtype; of one without values, whether its shape is."""
    if own.is_meta:
        return value.shape == own.shape
    return value.shape == own.shape and torch.equal(value.to(own.dtype), own.detach().cpu())


def find_heads(
    anatomy: Anatomy, modules: Mapping[str, nn.Module], folder: PeftFolder, directory: object
) -> dict[str, Tensor]:
    """Tensors of the file that replace the model's, by name: of modules that were saved whole, and trained biases.

    The others of `folder.heads` are compared with the model's own.

    Raises:
        AdapterFileError: a tensor that the model lacks, of another shape, with other values than the model's in a place
            that did not train; one that is missing; two for one parameter that differ.
    """
    state = tensors_in(modules)
    saved = [*(folder.config.get("modules_to_save") or ()), *peft_rules.task_heads(folder.config.get("task_type"))]
    whole = peft_rules.wrapped(saved, modules)
    biases = folder.config.get("bias") == "all"
    by_id = users(modules, anatomy.adapted)
    found = {}
    for key, value in folder.heads.items():
        _check_shape(anatomy.model, state, key, value, directory)
        names = [key, *by_id.get(id(state[key]), ())] if folder.config.get("ensure_weight_tying") else [key]
        is_saved = any(name.startswith(f"{path}.") for path in whole for name in names)
        if is_saved or (biases and key.rpartition(".")[2] == "bias"):
            found[key] = value
        elif not same(value, state[key]):
            raise AdapterFileError(
                f'"{directory}" carries {key}, which differs from the model\'s own and is in no module that '
                "modules_to_save names; load the same pretrained weights first."
            )
    _check_saved(state, modules, folder, directory)
    taken = {name: other for other, record in records(anatomy.model).items() for name in record.trained}
    _refuse_shared(by_id, state, taken, found, folder, directory)
    return found


def _check_saved(state: Iterable[str], modules: Mapping[str, nn.Module], folder: PeftFolder, directory: object) -> None:
    """Raise `AdapterFileError` where the file lacks a tensor of a module that `modules_to_save` names."""
    for path in peft_rules.wrapped(folder.config.get("modules_to_save") or (), modules):
        missing = [key for key in state if key.startswith(f"{path}.") and key not in folder.heads]
        if missing:
            raise AdapterFileError(f'"{directory}": modules_to_save names {path}, but the file lacks {missing[0]}.')


def _check_shape(model: nn.Module, state: Mapping[str, Tensor], key: str, value: Tensor, directory: object) -> None:
    """Raise `AdapterFileError` unless the model has a tensor of that name and shape."""
    if key not in state:
        raise AdapterFileError(
            f'"{directory}" carries {key}, which {type(model).__name__} lacks.{did_you_mean(key, state)}'
        )
    if value.shape != state[key].shape:
        raise AdapterFileError(
            f'"{directory}": {key} has shape {tuple(value.shape)}; the model needs {tuple(state[key].shape)}.'
            f"{resize_hint(model, state[key], value)}"
        )


def resize_hint(model: nn.Module, own: Tensor, value: Tensor) -> str:
    """What to call where only the number of tokens differs, or only that of classes."""
    if label_hint := classes_hint(model, own, value):
        return label_hint
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter else None
    if (
        embedding is None
        or len(own) == len(value)
        or own.shape[1:] != value.shape[1:]
        or len(own) != len(embedding.weight)
    ):
        return ""
    return (
        f" The vocabulary was resized: call model.resize_token_embeddings({len(value)}) first, with the tokenizer that "
        "the adapter was trained with."
    )


def _refuse_shared(
    by_id: Mapping[int, Sequence[str]],
    state: Mapping[str, Tensor],
    taken: Mapping[str, str],
    heads: Mapping[str, Tensor],
    folder: PeftFolder,
    directory: object,
) -> None:
    """Raise `AdapterFileError` if a head is adapted, another adapter's too, or tied to what the file says otherwise.

    Args:
        by_id: names under which each parameter is used, by its id.
        state: tensors of the model by name.
        taken: names of parameters that train with another adapter, and which.
        heads: tensors that replace them, by name.
        folder: the folder's content.
        directory: the folder, for messages.
    """
    for key, value in heads.items():
        if key in taken:
            raise AdapterFileError(
                f'"{directory}" carries {key}, which adapter "{taken[key]}" of the model has trained too; a model '
                "has one set of heads, so import it into a model of its own."
            )
        for other in by_id.get(id(state[key]), ()):
            if other not in heads and not same(value, state[key]):
                raise AdapterFileError(
                    f'"{directory}" carries {key}, which shares its weight with {other} in this model, while peft '
                    f"trained a copy. {_UNTIE}"
                )
            if other in heads and not torch.equal(value, heads[other]):
                raise AdapterFileError(
                    f'"{directory}" carries {key} and {other}, which differ, while they are one parameter of this '
                    f"model. {_UNTIE}"
                )
    whole = {key.rpartition(".")[0] for key in [*heads, *taken]}
    both = sorted(whole & folder.layers.keys())
    if both:
        raise AdapterFileError(f'"{directory}" adapts {both[0]}, which trains in full as well; one of the two only.')


_UNTIE = "import_peft(..., untie=True) gives the output layer a weight of its own."
