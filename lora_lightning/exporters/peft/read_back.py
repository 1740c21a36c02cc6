"""After an import: every tensor of the file was used, and is what the model holds now."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.folder import PeftFolder, PeftLayer
from lora_lightning.exporters.peft.read_heads import same, tensors_of
from lora_lightning.injection.records import injected_root
from lora_lightning.models.anatomy import Anatomy, survey


def check_read_back(anatomy: Anatomy, folder: PeftFolder, name: str, directory: object) -> None:
    """Look every target up anew and compare it with the file, in the target's dtype.

    Args:
        anatomy: of the model before the adapter was placed; nothing but the model is taken from it.
        folder: the folder's content.
        name: the adapter.
        directory: the folder, for messages.

    Raises:
        AdapterFileError: a tensor that was not used, or another value in the model.
    """
    now = survey(injected_root(anatomy.model))
    state = tensors_of(now.model)
    expected: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for path, layer in folder.layers.items():
        found = _layer(now, path, layer, name)
        expected |= {(path, role): pair for role, pair in found.items()}
    expected |= {(key, "head"): (value, state[key]) for key, value in folder.heads.items()}
    for path, values in folder.rows.items():
        extended = now.extended[path]
        order = [extended.own_ids.index(i) for i in folder.ids(path)]
        expected[path, "rows"] = (values, extended.own_rows[order])
    for what, key in folder.keys.items():
        if what not in expected:
            raise AdapterFileError(f'"{directory}": tensor {key} was read, but nothing in the model has taken it.')
        value, own = expected[what]
        if not same(value, own):
            raise AdapterFileError(f'"{directory}": tensor {key} is not what the model holds after the import.')


def _layer(now: Anatomy, path: str, layer: PeftLayer, name: str) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What the file says of one layer and what the model holds, by role."""
    adapted = now.adapted[path]
    adapter, originals = adapted.adapter(name), adapted.originals()
    sides = zip("AB", layer.matrices, adapter.own_factors(), strict=True)
    found = {side: (value, own) for side, value, own in sides}
    found |= {key: (layer.extra[key], own) for key, own in adapter.peft_tensors().items()}
    if layer.base is not None:
        found["base"] = (layer.base, originals["weight"])
    delta = layer.bias_delta(originals.get("bias"))
    if delta is not None:
        bias = (delta, adapter.get_parameter("bias_delta"))
        found |= dict.fromkeys(("bias", "base_bias"), bias)
    elif layer.base_bias is not None:
        found["base_bias"] = (layer.base_bias, originals["bias"])
    return found


def rows_once(folder: PeftFolder, shared: Mapping[str, int], directory: object) -> None:
    """Raise `AdapterFileError` where two tensors of the file are rows of one parameter and differ.

    Args:
        folder: the folder's content.
        shared: an identity of the parameter of each layer with rows, by path.
        directory: the folder, for messages.
    """
    first: dict[int, str] = {}
    for path, values in folder.rows.items():
        other = first.setdefault(shared.get(path, id(values)), path)
        if not torch.equal(values, folder.rows[other]):
            raise AdapterFileError(
                f'"{directory}": {folder.keys[other, "rows"]} and {folder.keys[path, "rows"]} differ, while these '
                "layers share their rows in this model. import_peft(..., untie=True) gives each its own."
            )
