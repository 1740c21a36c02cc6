"""nn.MultiheadAttention in peft's format, where one layer has the factors of both of its projections.

    <path>.lora_A, lora_B                         in_proj_weight   s B A
    <path>.base_layer.out_proj.lora_A, lora_B     out_proj         2 s B A

peft merges the latter twice for each pass, and into the weight that merge_and_unload() leaves, so its factors count
twice. It drops nothing there in training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.models.paths import join

IN, OUT = "in_proj_weight", "out_proj"
_OUT_IN_FILE = "base_layer.out_proj"


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
        if {path, join(path, _OUT_IN_FILE)} <= folder.layers.keys():
            names |= {path: join(path, IN), join(path, _OUT_IN_FILE): join(path, OUT)}
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


def projections(folder: PeftFolder, modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the layers of such attentions in a folder that `with_projections` gave."""
    adapted = [path for path in attentions(modules) if join(path, IN) in folder.layers]
    return {join(path, leaf) for path in adapted for leaf in (IN, OUT)}


def projection_notes(layers: Collection[str]) -> tuple[str, ...]:
    """For people, of `projections`: that factors count twice."""
    found = sorted(path for path in layers if path.rpartition(".")[2] == OUT)
    return (f"{found[0]}: the update counts twice, as peft 0.21 computes it",) if found else ()
