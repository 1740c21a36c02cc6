"""nn.MultiheadAttention in peft's format, where one layer has the factors of both of its projections.

    <path>.lora_A, lora_B                         in_proj_weight   s B A
    <path>.base_layer.out_proj.lora_A, lora_B     out_proj         2 s B A

peft merges the latter twice for each pass, and into the weight that merge_and_unload() leaves, so its factors count
twice. It drops nothing there in training, and has one rank and one scaling for both. An adapter without the
in-projection has zeros for it in the file; one without the output projection needs no such layer: the in-projection is
a parameter that `target_parameters` selects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.peft.factors import Factors
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.models.paths import join

IN, OUT = "in_proj_weight", "out_proj"
OUT_IN_FILE = "base_layer.out_proj"


def attentions(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of torch's attentions that have one matrix for queries, keys and values, as peft adapts them."""
    return [
        path
        for path, module in modules.items()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    ]


def with_projections(folder: PeftFolder, modules: Mapping[str, nn.Module], directory: object) -> PeftFolder:
    """The folder with the layers that such attentions have here; as it is where it adapts none.

    Args:
        folder: the folder's content.
        modules: modules of the plain model by path.
        directory: the folder, for messages.

    Raises:
        AdapterFileError: a bias has trained, which peft leaves out of what it computes.
    """
    names: dict[str, str] = {}
    for path in attentions(modules):
        if {path, join(path, OUT_IN_FILE)} <= folder.layers.keys():
            names |= {path: join(path, IN), join(path, OUT_IN_FILE): join(path, OUT)}
    if not names:
        return folder
    layers = {names.get(path, path): layer for path, layer in folder.layers.items()}
    for name in names.values():
        layer = layers[name]
        if layer.bias is not None:
            raise AdapterFileError(
                f'"{directory}" has lora_bias for {name}, part of an nn.MultiheadAttention, where peft computes '
                "without it. Train it there without lora_bias."
            )
        if name.rpartition(".")[2] == OUT:
            layers[name] = replace(layer, alpha=2 * layer.alpha, scaling=2 * layer.scaling)
        else:  # a matrix that its owner reads is a stack of one
            layers[name] = replace(layer, A=layer.A[None], B=layer.B[None], lead=(1,))
    keys = {(names.get(path, path), role): key for (path, role), key in folder.keys.items()}
    return replace(folder, layers=layers, keys=keys, former=folder.former or tuple(folder.layers))


def written_as_one(modules: Mapping[str, nn.Module], paths: Collection[str]) -> dict[str, tuple[str, str]]:
    """Attentions whose output projection is among the adapted `paths`, with the paths of both projections."""
    return {path: (join(path, IN), join(path, OUT)) for path in attentions(modules) if join(path, OUT) in paths}


def as_one(modules: Mapping[str, nn.Module], found: Mapping[str, Factors]) -> dict[str, tuple[Factors, Factors]]:
    """Factors of both projections of such attentions, with one rank and one scaling, as peft has them.

    Args:
        modules: modules of the plain model by path.
        found: factors by layer.

    Raises:
        ExportError: there is more than a pair of factors.
    """
    joined = {}
    for path, names in written_as_one(modules, found.keys()).items():
        own = [found[name] for name in names if name in found]
        if any(factors.extra or factors.bias is not None for factors in own):
            raise ExportError(
                f"{names[1]}: peft has a place for factors alone in an nn.MultiheadAttention: no DoRA, no bias. "
                'Train it without these, exclude it, or use format="merged".'
            )
        rank, scaling = max(factors.rank for factors in own), own[0].scaling
        width = cast(nn.MultiheadAttention, modules[path]).embed_dim
        inside, outside = (
            _padded(found[name], rank, scaling * times) if name in found else _zeros(rank, rows * width, width)
            for name, times, rows in zip(names, (1, 2), (3, 1), strict=True)
        )
        joined[path] = replace(inside, scaling=scaling), replace(outside, scaling=scaling)
    return joined


def tensors_of(joined: Mapping[str, tuple[Factors, Factors]]) -> dict[str, Tensor]:
    """Tensors of what `as_one` gives, by their names in a file."""
    places = {path: zip((path, join(path, OUT_IN_FILE)), both, strict=True) for path, both in joined.items()}
    pairs = [pair for found in places.values() for pair in found]
    return {f"{name}.lora_A.weight": f.A for name, f in pairs} | {f"{name}.lora_B.weight": f.B for name, f in pairs}


def _padded(factors: Factors, rank: int, scaling: float) -> Factors:
    """The same update with another rank and scaling; the axis of a stack of one left out."""
    A, B = factors.A.flatten(0, -2), factors.B.flatten(0, -2)
    more = rank - factors.rank
    return Factors(
        nn.functional.pad(A, (0, 0, 0, more)),
        nn.functional.pad(B, (0, more)) * (factors.scaling / scaling),
        scaling,
        None,
    )


def _zeros(rank: int, rows: int, width: int) -> Factors:
    return Factors(torch.zeros(rank, width), torch.zeros(rows, rank), 1.0, None)


def projections(folder: PeftFolder, modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the layers of such attentions in a folder that `with_projections` gave."""
    adapted = [path for path in attentions(modules) if join(path, IN) in folder.layers]
    return {join(path, leaf) for path in adapted for leaf in (IN, OUT)}


def projection_notes(layers: Collection[str]) -> tuple[str, ...]:
    """For people, of `projections`: that factors count twice."""
    found = sorted(path for path in layers if path.rpartition(".")[2] == OUT)
    return (f"{found[0]}: the update counts twice, as peft 0.21 computes it",) if found else ()
