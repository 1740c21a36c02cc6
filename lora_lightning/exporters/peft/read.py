"""Reading peft's LORA format into a model: layers, ranks and scalings come from the tensors of the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, check_name, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterFileError, PluginError, did_you_mean
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.experts import find_stacks
from lora_lightning.exporters.peft.folder import PeftFolder, PeftLayer
from lora_lightning.exporters.peft.rules import TYPE
from lora_lightning.exporters.peft.tokens import fill_rows, new_tokens, room_for
from lora_lightning.exporters.source import plain_modules, users
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.records import AdapterRecord, records
from lora_lightning.injection.report import InjectionReport, report_on
from lora_lightning.injection.targets import Selection
from lora_lightning.methods import Method, replace
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.paths import join
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
    anatomy = survey(model)
    check_ready(anatomy, name)
    folder = peft_file.read(directory, find_stacks(anatomy.layers))
    _refuse_variants(folder.config, directory)
    with room_for(model, new_tokens(folder, directory), directory) as added_rows:
        return _import(survey(model) if added_rows else anatomy, folder, directory, name)


def _import(anatomy: Anatomy, folder: PeftFolder, directory: str | Path, name: str) -> InjectionReport:
    reader = _reader(folder.config)
    modules = plain_modules(anatomy.model)
    base_layers = {}
    for path, layer in folder.layers.items():
        base_layers[path] = _base_layer(anatomy, modules, path, layer, directory)
    targets = _heads(anatomy, modules, folder, directory)
    method, settings = _settings(reader, folder, base_layers)
    seed = torch.initial_seed()
    adapters = {path: build_adapter(settings[path], path, base, seed) for path, base in base_layers.items()}
    rows = fill_rows(anatomy, folder, directory)
    trained = [key for key, value in targets.items() if isinstance(value, nn.Parameter)] + rows
    record = AdapterRecord(method, settings, tuple(trained), seed)
    layers = place_adapters(anatomy, name, adapters, record, base_layers, linked={})
    for path, adapter in adapters.items():
        _fill(adapter, folder.layers[path])
    for key, target in targets.items():
        write_values(target, folder.heads[key])
    tied = {path: layers[path].tied_to for path in adapters if layers[path].tied_to}
    return report_on(anatomy, name, record, adapters, Selection(base_layers, tied=tied), _unmatched(folder))


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
    anatomy: Anatomy, modules: Mapping[str, nn.Module], path: str, layer: PeftLayer, directory: str | Path
) -> BaseLayer:
    """The layer at `path`, after its shapes were compared."""
    if path not in anatomy.layers:
        raise AdapterFileError(
            f'"{directory}" adapts {path}, which {type(anatomy.model).__name__} lacks.'
            f"{did_you_mean(path, anatomy.layers)}"
        )
    there, base_layer = anatomy.layers[path]
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
    anatomy: Anatomy, modules: Mapping[str, nn.Module], folder: PeftFolder, directory: str | Path
) -> dict[str, Tensor]:
    """Tensors of the model that the file replaces, by name: those of modules that were saved whole."""
    state = {join(path, key): tensor for path, module in modules.items() for key, tensor in _own_tensors(module)}
    saved = [*(folder.config.get("modules_to_save") or ()), *peft_rules.task_heads(folder.config.get("task_type"))]
    whole = peft_rules.wrapped(saved, modules)
    found = {}
    for key, value in folder.heads.items():
        _check_head(anatomy.model, state, key, value, directory)
        if any(key.startswith(f"{path}.") for path in whole):
            found[key] = state[key]
        elif not _same(value, state[key]):
            raise AdapterFileError(
                f'"{directory}" carries {key}, which differs from the model\'s own and is in no module that '
                "modules_to_save names; load the same pretrained weights first."
            )
    _check_saved(state, modules, folder, directory)
    taken = {name: other for other, record in records(anatomy.model).items() for name in record.trained}
    _refuse_shared(users(modules, anatomy.adapted), taken, found, folder.layers, directory)
    return found


def _check_saved(
    state: Iterable[str], modules: Mapping[str, nn.Module], folder: PeftFolder, directory: str | Path
) -> None:
    """Raise `AdapterFileError` where the file lacks a tensor of a module that `modules_to_save` names."""
    for path in peft_rules.wrapped(folder.config.get("modules_to_save") or (), modules):
        missing = [key for key in state if key.startswith(f"{path}.") and key not in folder.heads]
        if missing:
            raise AdapterFileError(f'"{directory}": modules_to_save names {path}, but the file lacks {missing[0]}.')


def _check_head(model: nn.Module, state: Mapping[str, Tensor], key: str, value: Tensor, directory: str | Path) -> None:
    """Raise `AdapterFileError` unless the model has a tensor of that name and shape."""
    if key not in state:
        raise AdapterFileError(
            f'"{directory}" carries {key}, which {type(model).__name__} lacks.{did_you_mean(key, state)}'
        )
    if value.shape != state[key].shape:
        raise AdapterFileError(
            f'"{directory}": {key} has shape {tuple(value.shape)}; the model needs {tuple(state[key].shape)}.'
        )


def _refuse_shared(
    by_id: Mapping[int, Sequence[str]],
    taken: Mapping[str, str],
    heads: Mapping[str, Tensor],
    layers: Iterable[str],
    directory: str | Path,
) -> None:
    """Raise `AdapterFileError` if a head is adapted, another adapter's too, or tied to a parameter that is no head.

    Args:
        by_id: names under which each parameter is used, by its id.
        taken: names of parameters that train with another adapter, and which.
        heads: tensors that the file replaces, by name.
        layers: paths of the layers that the file adapts.
        directory: the folder, for messages.
    """
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
