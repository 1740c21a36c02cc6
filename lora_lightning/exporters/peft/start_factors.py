"""Adapters whose start took a part out of the base weight: PiSSA, OLoRA, CorDA, LoRA-GA.

On loading such a file peft takes the start factors A0, B0 out of the base weight again. Here the base stays as it is,
and the update is what that comes to, of rank 2r:

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

A0 and B0 come from the folder beside the adapter in which they were saved (`*init*`, as `pissa_init`). For PiSSA and
OLoRA they also follow from the base weight alone, by a singular value or a QR decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft.experts import Stacks
from lora_lightning.exporters.peft.folder import PeftFolder, PeftLayer
from lora_lightning.exporters.peft.rules import CONFIG, DEFAULT_ALPHA, DEFAULT_RANK

PREFIXES = ("pissa", "olora", "corda", "lora_ga")


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the start took a part out of the base weight."""
    return str(config.get("init_lora_weights")).lower().startswith(PREFIXES)


def with_start(
    folder: PeftFolder, base_layers: Mapping[str, BaseLayer], stacks: Stacks, directory: str | Path
) -> PeftFolder:
    """The folder with updates of the base weight as it is.

    Raises:
        AdapterFileError: the start factors are neither there nor computable, or do not fit.
    """
    start = str(folder.config["init_lora_weights"])
    saved = _saved(folder, stacks, Path(directory))
    layers = {}
    for path, layer in folder.layers.items():
        first = saved[path] if saved else _computed(start, layer, base_layers[path], path, directory)
        if layer.extra or layer.lead:
            raise AdapterFileError(
                f'"{directory}" has init_lora_weights={start!r} on {path}, which has more than a pair of factors. '
                f"{_CONVERT}"
            )
        layers[path] = replace(
            layer,
            A=torch.cat([layer.matrices[0], first[0].to(layer.A.dtype)]),
            B=torch.cat([layer.matrices[1], -first[1].to(layer.B.dtype)], dim=1),
            alpha=layer.alpha * (math.sqrt(2) if folder.config.get("use_rslora") else 2),
        )
    wider = math.sqrt(2) if folder.config.get("use_rslora") else 2
    config = {
        **folder.config,
        "r": 2 * folder.config.get("r", DEFAULT_RANK),
        "lora_alpha": wider * folder.config.get("lora_alpha", DEFAULT_ALPHA),
    }
    return replace(folder, config=config, layers=layers)


_CONVERT = (
    "Convert it in peft (save_pretrained with path_initial_model_for_weight_conversion), or put the folder with its "
    "start factors inside, as pissa_init, and read the result."
)


def _saved(folder: PeftFolder, stacks: Stacks, directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Start factors by layer, from the one folder that holds them; none where there is no such folder."""
    there = sorted(path.parent for path in directory.glob(f"*init*/{CONFIG}"))
    if not there:
        return {}
    if len(there) > 1:
        raise AdapterFileError(f'"{directory}" holds {", ".join(p.name for p in there)}; keep one with start factors.')
    first = peft_file.read(there[0], stacks)
    for path, layer in folder.layers.items():
        other = first.layers.get(path)
        if other is None or other.A.shape != layer.A.shape or not math.isclose(other.scaling, layer.scaling):
            raise AdapterFileError(f'"{there[0]}" has no start factors of the same shape and scaling for {path}.')
    return {path: layer.matrices for path, layer in first.layers.items()}


def _computed(start: str, layer: PeftLayer, base: BaseLayer, path: str, directory: str | Path) -> tuple[Tensor, Tensor]:
    """A0 and B0 that peft would take out of the weight."""
    weight = base.weight().detach().float().cpu()
    if start == "olora" and isinstance(base.module, nn.Linear):
        Q, R = torch.linalg.qr(weight)
        return R[: layer.rank], Q[:, : layer.rank]
    if start == "pissa" and base.kind == "linear":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[: layer.rank] / layer.scaling).sqrt()
        return root[:, None] * Vh[: layer.rank], U[:, : layer.rank] * root
    raise AdapterFileError(
        f'"{directory}" has init_lora_weights={start!r}, with which peft changes the base weight of {path} on loading, '
        f"and its start factors are not there. {_CONVERT}"
    )
