"""Heads and output layers of Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from lora_lightning.models.paths import inside, join, segments


def head_prefixes(pretrained: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of task heads: what lies outside the backbone of a Hugging Face model, and its poolers.

    A language model's output layer is pretrained, so a language model has no head in this sense.

    Args:
        pretrained: Hugging Face models by path.
        modules: every module of the whole model by path.
    """
    prefixes: list[str] = []
    for path, hf_model in pretrained.items():
        if output_embeddings(hf_model) is not None:
            continue
        heads = []
        for name, child in outside_backbone(hf_model).items():
            if next(child.parameters(), None) is not None:
                heads.append(join(path, name))
        if heads:
            poolers = [name for name in modules if inside(name, path) and segments(name)[-1] == "pooler"]
            prefixes += heads + poolers
    return prefixes


def outside_backbone(hf_model: nn.Module) -> dict[str, nn.Module]:
    """Children of a Hugging Face model beside its backbone, by name; none where it is a backbone itself."""
    backbone = cast(str, hf_model.base_model_prefix)
    if not hasattr(hf_model, backbone):
        return {}
    return {name: child for name, child in hf_model.named_children() if name != backbone}


def output_layers(pretrained: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the output layers of language models; arguments as in `head_prefixes`."""
    outputs = {id(output_embeddings(hf_model)) for hf_model in pretrained.values()} - {id(None)}
    return [path for path, module in modules.items() if id(module) in outputs]


def output_embeddings(hf_model: nn.Module) -> nn.Module | None:
    """The output layer of a Hugging Face language model; None in other models."""
    getter = getattr(hf_model, "get_output_embeddings", None)
    return cast("nn.Module | None", getter() if getter else None)
