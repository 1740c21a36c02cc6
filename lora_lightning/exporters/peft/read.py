"""Reading peft's LORA format into a model: layers, ranks and scalings come from the tensors of the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter, check_name, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterFileError, PluginError, did_you_mean
from lora_lightning.exporters.peft import file as peft_file
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.experts import find_stacks
from lora_lightning.exporters.peft.file import PeftFolder, PeftLayer
from lora_lightning.exporters.peft.rules import TYPE
from lora_lightning.exporters.peft.tokens import fill_rows, new_tokens, room_for
from lora_lightning.exporters.source import plain_modules, users
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.records import AdapterRecord, records
from lora_lightning.injection.report import InjectionReport
from lora_lightning.methods import Method, replace
from lora_lightning.models.anatomy import all_layers
from lora_lightning.models.base_layers import count_numbers, kind_of, quantized_layers
from lora_lightning.plugins import registry

_READ = frozenset({"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"})
_DECIDED_BY_TENSORS = frozenset(
    {
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "lora_bias",
        "trainable_token_indices",
    }
)
_NO_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type", "eva_config",
    }
)  # fmt: skip
_STARTS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def import_folder(model: nn.Module, directory: str | Path, name: str) -> InjectionReport:
    """Inject the adapter of a peft folder; see `lora_lightning.exporters.export.import_peft`."""
    check_name(name)
    check_ready(model, name)
    folder = peft_file.read(directory, find_stacks(model))
    _refuse_variants(folder.config, directory)
    with room_for(model, new_tokens(folder, directory), directory):
        return _import(model, folder, directory, name)


def _import(model: nn.Module, folder: PeftFolder, directory: str | Path, name: str) -> InjectionReport:
    reader = _reader(folder.config)
    modules = plain_modules(model)
    layers = {path: (module, base_layer) for path, module, base_layer in all_layers(model)}
    base_layers = {
        path: _base_layer(model, layers, modules, path, layer, directory) for path, layer in folder.layers.items()
    }
    targets = _heads(model, modules, folder, directory)
    method, settings = _settings(reader, folder, base_layers)
    adapters = {
        path: build_adapter(settings[path], path, base, torch.initial_seed()) for path, base in base_layers.items()
    }
    rows = {row: cast(Tensor, model.get_parameter(row)) for row in fill_rows(model, folder, directory)}
    trained = [key for key, value in targets.items() if isinstance(value, nn.Parameter)] + list(rows)
    place_adapters(
        model, name, adapters, AdapterRecord(method, settings, tuple(trained), torch.initial_seed()), base_layers
    )
    for path, adapter in adapters.items():
        _fill(adapter, folder.layers[path])
    for key, target in targets.items():
        write_values(target, folder.heads[key])
    placed = {path: cast(AdaptedLayer, model.get_submodule(path)) for path in adapters}
    return InjectionReport(
        name=name,
        method=method,
        layers={path: (kind_of(base), base.d_in, base.d_out) for path, base in base_layers.items()},
        adapter_parameters=sum(p.numel() for adapter in adapters.values() for p in adapter.parameters()),
        trained={key: {**targets, **rows}[key].numel() for key in trained},
        total_parameters=count_numbers(model, dict(quantized_layers(model))),
        tied={path: layer.tied_to for path, layer in placed.items() if layer.tied_to},
        notes=_unmatched(folder),
    )


def _refuse_variants(config: Mapping[str, Any], directory: str | Path) -> None:
    """Raise `AdapterFileError` for every setting that would make the factors mean something else."""
    if config.get("peft_type") != TYPE:
        raise AdapterFileError(f'"{directory}" has peft_type {config.get("peft_type")!r}; only "{TYPE}" is read.')
    start = config.get("init_lora_weights", True)
    if start not in _STARTS_THAT_KEEP_THE_BASE:
        raise AdapterFileError(
            f'"{directory}" has init_lora_weights={start!r}, with which peft changes the base weights on loading. '
            "Convert it in peft (save_pretrained with path_initial_model_for_weight_conversion), and read the result."
        )
    if config.get("bias", "none") != "none":
        raise AdapterFileError(
            f'"{directory}" has bias={config["bias"]!r}, with which the biases of the base model were trained; only '
            '"none" is read.'
        )
    options = {key for method in _speaking() for key in method.peft_options}
    known = _READ | _DECIDED_BY_TENSORS | _NO_EFFECT | options | {"init_lora_weights", "bias"}
    unsupported = sorted(key for key, value in config.items() if value and key not in known)
    if unsupported:
        raise AdapterFileError(
            f'"{directory}" uses {", ".join(unsupported)}, which no installed method reads: its factors mean something '
            "else than W + s B A."
        )


def _speaking() -> list[type[Method]]:
    return [method for method in registry().methods.values() if method.peft_type == TYPE]


def _reader(config: Mapping[str, Any]) -> type[Method]:
    """The installed method that the configuration's options mean.

    Raises:
        PluginError: there is none, or several.
    """
    methods = _speaking()
    stated = {key: config[key] for method in methods for key in method.peft_options if config.get(key)}
    found = [method for method in methods if method.peft_options == stated]
    if len(found) == 1:
        return found[0]
    options = f" with {', '.join(f'{key}={value}' for key, value in stated.items())}" if stated else ""
    names = f": {', '.join(method.__name__ for method in found)}" if found else ""
    raise PluginError(
        f"{len(found)} installed methods read peft's {TYPE} format{options}{names}; exactly one is needed. "
        f"Plugins: {', '.join(sorted({p.plugin for p in registry().providers.values()})) or 'none'}."
    )


def _base_layer(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, BaseLayer | None]],
    modules: Mapping[str, nn.Module],
    path: str,
    layer: PeftLayer,
    directory: str | Path,
) -> BaseLayer:
    """The layer at `path`, after its shapes were compared."""
    if path not in layers:
        raise AdapterFileError(
            f'"{directory}" adapts {path}, which {type(model).__name__} lacks.{did_you_mean(path, layers)}'
        )
    there, base_layer = layers[path]
    if base_layer is None:
        raise AdapterFileError(f'"{directory}" adapts {path}, a {type(there).__name__}, which takes no adapter here.')
    reason = peft_rules.unlike(path, modules, there)
    if reason:
        raise AdapterFileError(f'"{directory}" adapts {path}: {reason}.')
    shapes = tuple(tuple(matrix.shape) for matrix in layer.matrices)
    needed = (*base_layer.lead, layer.rank, base_layer.d_in), (*base_layer.lead, base_layer.d_out, layer.rank)
    if shapes != needed:
        raise AdapterFileError(f'"{directory}": the factors of {path} are {shapes}; the layer needs {needed}.')
    for key, values in layer.extra.items():
        if values.numel() != base_layer.d_out:
            raise AdapterFileError(
                f'"{directory}": {key} of {path} has {values.numel()} numbers; the layer needs {base_layer.d_out}.'
            )
    if layer.base is not None and not _same(layer.base, base_layer.stored):
        raise AdapterFileError(
            f'"{directory}" carries a base weight for {path} of shape {tuple(layer.base.shape)} that differs from the '
            "model's own; load the same pretrained weights, and resize their vocabulary as it was, first."
        )
    return base_layer


def _same(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and torch.equal(value.to(own.dtype), own.detach().cpu())


def _heads(
    model: nn.Module, modules: Mapping[str, nn.Module], folder: PeftFolder, directory: str | Path
) -> dict[str, Tensor]:
    """Tensors of the model that the file replaces, by name: those of modules that were saved whole."""
    state = {f"{path}.{key}".lstrip("."): tensor for path, m in modules.items() for key, tensor in _own_tensors(m)}
    saved = [*(folder.config.get("modules_to_save") or ()), *peft_rules.task_heads(folder.config.get("task_type"))]
    whole = peft_rules.wrapped(saved, modules)
    found = {}
    for key, value in folder.heads.items():
        if key not in state:
            raise AdapterFileError(
                f'"{directory}" carries {key}, which {type(model).__name__} lacks.{did_you_mean(key, state)}'
            )
        if value.shape != state[key].shape:
            raise AdapterFileError(
                f'"{directory}": {key} has shape {tuple(value.shape)}; the model needs {tuple(state[key].shape)}.'
            )
        if any(key.startswith(f"{path}.") for path in whole):
            found[key] = state[key]
        elif not _same(value, state[key]):
            raise AdapterFileError(
                f'"{directory}" carries {key}, which differs from the model\'s own and is in no module that '
                "modules_to_save names; load the same pretrained weights first."
            )
    for path in peft_rules.wrapped(folder.config.get("modules_to_save") or (), modules):
        missing = [key for key in state if key.startswith(f"{path}.") and key not in folder.heads]
        if missing:
            raise AdapterFileError(f'"{directory}": modules_to_save names {path}, but the file lacks {missing[0]}.')
    _refuse_shared(model, found, folder.layers, directory)
    return found


def _refuse_shared(model: nn.Module, heads: Mapping[str, Tensor], layers: Iterable[str], directory: str | Path) -> None:
    """Raise `AdapterFileError` if a head is adapted, another adapter's too, or tied to a parameter that is no head."""
    taken = {parameter: other for other, record in records(model).items() for parameter in record.trained}
    by_id = users(model)
    for key, tensor in heads.items():
        if key in taken:
            raise AdapterFileError(
                f'"{directory}" carries {key}, which adapter "{taken[key]}" of the model has trained too; a model '
                "has one set of heads, so import it into a model of its own."
            )
        others = [other for other in by_id.get(id(tensor), ()) if other not in heads]
        if others:
            raise AdapterFileError(
                f'"{directory}" carries {key}, which shares its weight with {others[0]} in this model, while peft '
                "trained a copy. Untie the weight first."
            )
    whole = {key.rpartition(".")[0] for key in [*heads, *taken]}
    both = sorted(whole & set(layers))
    if both:
        raise AdapterFileError(f'"{directory}" adapts {both[0]}, which trains in full as well; one of the two only.')


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return [(key, tensor) for key, tensor in own.items() if key not in module._non_persistent_buffers_set]


def _settings(
    reader: type[Method], folder: PeftFolder, base_layers: Mapping[str, BaseLayer]
) -> tuple[Method, dict[str, Method]]:
    """The method with the file's settings, as a whole and for each layer."""
    config = folder.config
    with_bias = {"bias": True} if any(layer.bias is not None for layer in folder.layers.values()) else {}
    method = replace(
        reader(),
        peft_rules.CONFIG,
        {
            "rank": config.get("r", peft_rules.DEFAULT_RANK),
            "alpha": float(config.get("lora_alpha", peft_rules.DEFAULT_ALPHA)),
            "dropout": config.get("lora_dropout", 0.0),
            "scaling_rule": "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
            **with_bias,
        },
    )
    settings = {}
    for path, layer in folder.layers.items():
        own: dict[str, Any] = {"rank": layer.rank, "alpha": float(layer.alpha)}
        if with_bias:
            own["bias"] = layer.bias is not None
        if base_layers[path].kind == "embedding":
            own["dropout"] = 0.0  # peft drops nothing there either
        settings[path] = replace(method, path, own)
    return method, settings


def _fill(adapter: Adapter, layer: PeftLayer) -> None:
    (pair,) = adapter.factor_pairs()
    for factor, matrix in zip((pair.lora_A, pair.lora_B), layer.matrices, strict=True):
        write_values(factor, matrix)
    for key, tensor in adapter.peft_tensors().items():
        write_values(tensor, layer.extra[key])
    if layer.bias is not None:
        write_values(adapter.get_parameter("bias_delta"), layer.scaling * layer.bias)


def _unmatched(folder: PeftFolder) -> tuple[str, ...]:
    """Targets that the configuration names, but no tensor belongs to; peft says nothing about them."""
    targets = folder.config.get("target_modules") or ()
    if isinstance(targets, str):
        return ()
    return tuple(
        f'target_modules names "{target}", which no tensor of the file belongs to.{did_you_mean(target, folder.layers)}'
        for target in targets
        if not peft_rules.selected([target], (), folder.layers)
    )
