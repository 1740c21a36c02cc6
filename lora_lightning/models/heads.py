"""Heads of a Hugging Face model, and names along a module path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from torch import nn

from lora_lightning.errors import TargetError
from lora_lightning.models.scopes import join, pretrained_models


def segments(path: str) -> list[str]:
    """Names along a module path."""
    return path.split(".")


def within(pattern: str, path: str) -> bool:
    """Whether `pattern` is a run of whole names inside `path`, or a regular expression for all of it."""
    return f".{pattern}." in f".{path}." or full_match(pattern, path, "pattern")


def full_match(pattern: str, path: str, where: str) -> bool:
    """Whether the expression `pattern` fits all of `path`; raises `TargetError` naming `where` where it is none."""
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise TargetError(
            f'{where}: "{pattern}" is neither a part of a name nor a regular expression: {error}.'
        ) from error


def head_prefixes(model: nn.Module) -> list[str]:
    """Paths of task heads: what lies outside the backbone of a Hugging Face model, and its poolers.

    A language model's output layer is pretrained, so a language model has no head in this sense.
    """
    prefixes = []
    for path, hf_model in pretrained_models(model):
        backbone = cast(str, hf_model.base_model_prefix)
        if not hasattr(hf_model, backbone) or output_embeddings(hf_model) is not None:
            continue
        outside = [join(path, name) for name, _ in hf_model.named_children() if name != backbone]
        outside = [name for name in outside if any(True for _ in model.get_submodule(name).parameters())]
        poolers = [join(path, name) for name, _ in hf_model.named_modules() if segments(name)[-1] == "pooler"]
        prefixes += outside + (poolers if outside else [])
    return prefixes


def kept_plain(model: nn.Module, also_train: Sequence[str] = ()) -> list[str]:
    """Paths of modules that are not to be quantized: heads, output layers, and what trains in full."""
    found = dict.fromkeys(head_prefixes(model))
    for path, hf_model in pretrained_models(model):
        output = output_embeddings(hf_model)
        found |= {join(path, name): None for name, module in hf_model.named_modules() if module is output}
    for name, _ in model.named_parameters():
        if any(within(pattern, name) for pattern in also_train):
            found[name.rpartition(".")[0]] = None
    return list(found)


def output_embeddings(hf_model: nn.Module) -> nn.Module | None:
    """The output layer of a Hugging Face language model; None in other models."""
    getter = getattr(hf_model, "get_output_embeddings", None)
    return cast("nn.Module | None", getter() if getter else None)
