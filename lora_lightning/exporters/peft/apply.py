"""A small reader of peft's LORA format, which follows peft's rules where peft is not installed.

It writes what the files say into a plain model: layers are those that the configuration selects, as in peft, not those
that the tensors name. tests/exporters/peft/test_apply.py compares its models with peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft.experts import is_target
from lora_lightning.exporters.peft.folder import PeftFolder, PeftLayer
from lora_lightning.exporters.peft.read_heads import tensors_of
from lora_lightning.exporters.peft.rules import following_rows, input_embedding
from lora_lightning.exporters.peft.selection import expected_modules
from lora_lightning.exporters.peft.torch_attention import IN, OUT
from lora_lightning.models.experts import single
from lora_lightning.models.paths import join


@torch.no_grad()
def apply_folder(folder: PeftFolder, model: nn.Module) -> None:
    """Change a plain model into what peft would compute with the folder, in place.

    Raises:
        ExportError: the configuration selects a layer without factors, or factors that nothing selects are left.
    """
    modules = dict(model.named_modules())
    left = dict(folder.layers)
    for name, value in folder.heads.items():
        _replace(model, name, value)
    stated = folder.config.get("target_parameters") or ()
    layers = {path for path, module in modules.items() if core_base_layer(module) is not None}
    weights = {path for path in layers if is_target(f"{path}.weight", stated)}
    for path in weights | (expected_modules(folder.config, model, modules) or set()):
        if isinstance(modules[path], nn.MultiheadAttention):
            _write_parameter(modules[path], IN, left.pop(join(path, IN), None), join(path, IN))
            path = join(path, OUT)
        layer, base = left.pop(path, None), core_base_layer(modules[path])
        if layer is None or base is None:
            raise ExportError(f"the configuration selects {path}, for which there are no factors.")
        _write(base, layer)
    for owner, module in modules.items():
        for name in list(module._parameters):
            path = join(owner, name)
            if owner not in layers and is_target(path, stated):
                _write_parameter(module, name, left.pop(path, None), path)
    if left:
        raise ExportError(f"the configuration does not select {next(iter(left))}, for which there are factors.")
    _write_rows(folder, model)


def _write(base: BaseLayer, layer: PeftLayer) -> None:
    module: Any = base.module
    if layer.base is not None:
        module.weight = nn.Parameter(layer.base.to(module.weight), requires_grad=False)
        base = core_base_layer(module) or base
    delta = layer.bias_delta(base.bias)
    if delta is not None:
        own = torch.zeros(base.d_out, device=base.device) if base.bias is None else base.bias
        module.bias = nn.Parameter((own.float() + delta.to(own.device)).to(module.weight.dtype), requires_grad=False)
    weight = base.weight().double()
    merged = weight + layer.update(weight.cpu()).to(weight.device)
    stored = base._store(merged).to(module.weight.dtype)
    module.weight = nn.Parameter(stored.reshape(module.weight.shape).contiguous(), requires_grad=False)


def _write_parameter(owner: nn.Module, name: str, layer: PeftLayer | None, path: str) -> None:
    base = core_base_layer(single(owner, name))
    if layer is None or base is None:
        raise ExportError(f"target_parameters selects {path}, for which there are no factors.")
    merged = base.weight().double() + layer.delta().to(base.device)
    setattr(owner, name, nn.Parameter(base._store(merged).to(base.stored.dtype), requires_grad=False))


def _write_rows(folder: PeftFolder, model: nn.Module) -> None:
    """Rows of tokens, in the layers that have them and those that peft ties; they are computed without their bias."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    embedding = input_embedding(model)
    sharing = [path for path, module in modules.items() if _shares(module, embedding)]
    tied = following_rows(model, sharing)
    for path, values in folder.rows.items():
        shared = modules[path].weight
        weight = shared.detach().clone()
        weight[torch.tensor(folder.ids(path), device=weight.device)] = values.to(weight)
        for other in (path, *(tied if modules[path] is embedding else ())):
            modules[other].weight = nn.Parameter(weight, requires_grad=False)
            if isinstance(modules[other], nn.Linear):
                modules[other].bias = None


def _shares(module: nn.Module, embedding: Any) -> bool:
    return embedding is not None and module._parameters.get("weight") is embedding.weight


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Write one tensor of the plain model, in a parameter of its own: peft has copies of what it saves whole."""
    own = tensors_of(model)[name]
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if isinstance(own, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(value.to(own), requires_grad=False)
    else:
        owner._buffers[leaf] = value.to(own)
