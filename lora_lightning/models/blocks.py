"""Depth: which repeated block of a network a layer lies in, and how many blocks come before it.

    encoder.layer.0.attention.query    block encoder.layer.0, number 0 of the stack encoder.layer
    layers.5.mlp.experts.gate_up       block layers.5, whatever lists lie inside the block
    pooler.dense                       in no list: a block of its own, among all such layers

A stack is an outermost `nn.ModuleList`. Only blocks that hold one of the asked layers are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lora_lightning.models.paths import join, segments


class Block(NamedTuple):
    """A block, and its place in its stack."""

    path: str
    """Of the module; of a layer in no list the layer's own."""
    stack: str | None
    """Path of the list; None for layers in no list, which make one stack together."""
    number: int
    """How many asked blocks of the stack come before it."""
    total: int
    """How many asked blocks the stack has."""


def blocks_of(model: nn.Module, layers: Iterable[str]) -> dict[str, Block]:
    """The block of each layer, by the layer's path; stacks are counted one by one, in the order of the model.

    Args:
        model: the model that holds the layers.
        layers: paths of layers, in the order of the model.
    """
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    places = {layer: _place(layer, lists) for layer in layers}
    stacks: dict[str | None, list[str]] = {}
    for path, stack in places.values():
        if path not in stacks.setdefault(stack, []):
            stacks[stack].append(path)
    for stack, paths in stacks.items():
        if stack is not None:
            paths.sort(key=lambda path: int(segments(path)[-1]))
    return {
        layer: Block(path, stack, stacks[stack].index(path), len(stacks[stack]))
        for layer, (path, stack) in places.items()
    }


def same_place_before(model: nn.Module, layers: Iterable[str]) -> dict[str, list[str]]:
    """For each layer, those at the same place in earlier blocks of its stack, nearest first; none outside of lists.

    Args:
        model: the model that holds the layers.
        layers: paths of layers, in the order of the model.
    """
    chains: dict[tuple[str | None, str], list[tuple[int, str]]] = {}
    blocks = blocks_of(model, layers)
    for layer, block in blocks.items():
        chains.setdefault((block.stack, layer.removeprefix(block.path)), []).append((block.number, layer))
    found: dict[str, list[str]] = {}
    for (stack, _), chain in chains.items():
        ordered = [layer for _, layer in sorted(chain)]
        found |= {layer: ordered[:i][::-1] if stack is not None else [] for i, layer in enumerate(ordered)}
    return {layer: found[layer] for layer in blocks}


def _place(layer: str, lists: set[str]) -> tuple[str, str | None]:
    """Path of the block around a layer, and of the outermost list that holds it."""
    parts = segments(layer)
    for length in range(len(parts)):
        prefix = join(*parts[:length])
        if prefix in lists:
            return join(prefix, parts[length]), prefix
    return layer, None
