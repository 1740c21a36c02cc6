"""The export format "npz": merged weights of adapted layers, for programs that have numpy and no torch.

merged.npz    `<layer>.weight` as (d_out, d_in), and `<layer>.bias` where there is one, in float32; parameters that
              trained in full under their own names
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.errors import ExportError
from lora_lightning.exporters.report import Written
from lora_lightning.exporters.source import Source, check_finite, plain_modules

FILE = "merged.npz"


def write(source: Source, folder: Path, rank: int | None, verify: bool) -> Written:  # noqa: ARG001 - every format's signature
    """Write the weights into an empty folder, and read them back."""
    tensors: dict[str, Any] = {}
    for path, layer in source.layers.items():
        source.check_fixed(path)
        base = layer.base_layer
        tensors[base.weight_name(path)] = layer.merged_weight(source.name, base.adapter_dtype)
        bias = source.adapter(path).merged_bias(layer.originals().get("bias"))
        if bias is not None:
            tensors[f"{path}.bias"] = bias
    modules = plain_modules(source.host)
    for name in source.trained:
        path, _, leaf = name.rpartition(".")
        tensors[name] = modules[path].get_parameter(leaf)
    check_finite("a merged weight", tensors)
    arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}
    np.savez(folder / FILE, **arrays)
    if verify:
        with np.load(folder / FILE) as found:
            for name, array in arrays.items():
                if not np.array_equal(found[name], array):
                    raise ExportError(f"{name} does not read back bit for bit.")
    return Written(kind="merged weights", layers=len(source.layers), difference=0.0 if verify else None)
