"""Reading peft's LORA format into a model: layers, ranks and scalings come from the tensors of the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, check_name, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterFileError, PluginError, SettingsError, did_you_mean
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.experts import find_stacks, is_target
from lora_lightning.exporters.peft.folder import PeftFolder, PeftLayer
from lora_lightning.exporters.peft.former_names import with_present_names
from lora_lightning.exporters.peft.own_types import read_own, types
from lora_lightning.exporters.peft.read_back import check_read_back
from lora_lightning.exporters.peft.read_heads import TRAINED_BIASES, find_heads, resize_hint, same, tensors_in
from lora_lightning.exporters.peft.rules import TYPE
from lora_lightning.exporters.peft.selection import dead_settings, expected_modules
from lora_lightning.exporters.peft.start_factors import changes_base, with_start
from lora_lightning.exporters.peft.tokens import (
    check_matrices,
    fill_rows,
    known_tokens,
    may_extend,
    names_of_rows,
    new_tokens,
    room_for,
    whole_matrices,
)
from lora_lightning.exporters.peft.torch_attention import IN, projection_notes, projections, with_projections
from lora_lightning.exporters.peft.triplets import TRIPLETS, WEIGHTS
from lora_lightning.exporters.source import plain_modules
from lora_lightning.injection.merge_model import eject
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.records import AdapterRecord
from lora_lightning.injection.report import InjectionReport, report_on
from lora_lightning.injection.targets import Selection
from lora_lightning.methods import Method, replace
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.meta import is_counted, values_follow
from lora_lightning.models.paths import join
from lora_lightning.models.token_rows import TokenRows, room_for_rows, row_notes
from lora_lightning.models.untied import apart, untied_note
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
        "ensure_weight_tying",
    }
)
_NO_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type", "eva_config", "corda_config", "lora_ga_config",
    }
)  # fmt: skip
_MERGE_IN_PEFT = "Where peft can merge it, use the model of its merge_and_unload()."
_STARTS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def import_folder(model: nn.Module, directory: str | Path, name: str, untie: bool = False) -> InjectionReport:
    """Inject the adapter of a peft folder; see `lora_lightning.exporters.export.import_peft`."""
    check_name(name)
    anatomy = survey(model)
    check_ready(anatomy, name)
    config = peft_file.read_config(directory)
    if config.get("peft_type") in types():
        with apart(anatomy, untie) as anatomy:
            return read_own(anatomy, config, directory, name)
    _refuse_variants(config, directory)
    with apart(anatomy, untie) as anatomy:
        return _import_into(anatomy, directory, name)


def _import_into(anatomy: Anatomy, directory: str | Path, name: str) -> InjectionReport:
    model = anatomy.model
    folder = peft_file.read(directory, find_stacks(anatomy.layers), values=not is_counted(model))
    if values_follow(model):
        _refuse_without_values(model, folder, directory)
    modules = plain_modules(model)
    folder = with_present_names(folder, anatomy, tensors_in(modules), directory)
    folder = with_projections(folder, modules, directory)
    added, folder, matrices = whole_matrices(model, folder, tensors_in(modules), directory)
    added = added or new_tokens(model, folder, directory)
    with room_for(model, added, directory) as added_rows:
        anatomy = survey(model) if added_rows else anatomy
        known = known_tokens(anatomy, folder, added, directory)
        with room_for_rows(anatomy, known) as anatomy:
            modules = plain_modules(model) if added_rows or known else modules
            return _import(anatomy, modules, folder, matrices, known, directory, name)


def _refuse_without_values(model: nn.Module, folder: PeftFolder, directory: str | Path) -> None:
    """Raise `SettingsError` where values of the base model decide what the folder means, and they are not at hand."""
    start = folder.config.get("init_lora_weights")
    why = f"init_lora_weights={start!r} changes the base weights" if changes_base(folder.config) else ""
    if may_extend(model, folder, tensors_in(plain_modules(model)), directory):
        why = "it carries the whole embedding, in which new tokens are found by comparison with the base model's"
    if why:
        raise SettingsError(
            f'"{directory}" cannot be read in estimate and doctor, nor by all processes of this strategy, as {why}. '
            "Read it once with import_peft, and save it with save_adapter: that folder needs no values."
        )


def _import(
    anatomy: Anatomy,
    modules: Mapping[str, nn.Module],
    folder: PeftFolder,
    matrices: Mapping[str, Tensor],
    known: Mapping[str, TokenRows],
    directory: str | Path,
    name: str,
) -> InjectionReport:
    reader = _reader(folder.config)
    attention, base_layers = projections(folder, modules), {}
    for path, layer in folder.layers.items():
        base_layers[path] = _base_layer(anatomy, modules, path, layer, directory)
        reason = None if path in attention else peft_rules.unlike(path, modules, anatomy.layers[path][0])
        if reason:
            raise AdapterFileError(f'"{directory}" adapts {path}: {reason}. {_MERGE_IN_PEFT}')
    notes = (*_check_whole(anatomy, modules, folder, directory), *projection_notes(attention))
    if changes_base(folder.config):
        folder = with_start(folder, base_layers, find_stacks(anatomy.layers), directory)
        notes += (
            f"rank {folder.config['r']}: the start factors, which peft takes out of the base weights, are part of it",
        )
    heads = find_heads(anatomy, modules, folder, directory)
    notes += (*row_notes(anatomy, known), *untied_note(anatomy.model))
    method, settings = _settings(reader, folder, base_layers, attention, directory)
    seed = torch.initial_seed()
    adapters = {path: build_adapter(settings[path], path, base, seed) for path, base in base_layers.items()}
    rows = names_of_rows(anatomy, folder, known)
    record = AdapterRecord(method, settings, (*_trained(anatomy, modules, heads), *rows), seed, tokens=known)
    layers = place_adapters(anatomy, name, adapters, record, base_layers, linked={})
    before = {key: tensor.detach().clone() for key, tensor in tensors_in(modules).items() if key in heads}
    try:
        for path, adapter in adapters.items():
            _fill(adapter, folder.layers[path], layers[path].originals().get("bias"))
        fill_rows(anatomy, folder, directory)
        check_matrices(anatomy, matrices, directory)
        _write_heads(modules, heads)
        check_read_back(anatomy, folder, name, directory)
    except BaseException:
        _write_heads(modules, before)
        eject(anatomy.model, name)
        raise
    tied = {path: layers[path].tied_to for path in adapters if layers[path].tied_to}
    return report_on(anatomy, name, record, adapters, Selection(base_layers, tied=tied), notes)


def _write_heads(modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> None:
    """Write parameters and buffers by name, looked up anew: placing an adapter replaces those in half precision."""
    state = tensors_in(modules)
    for key, value in values.items():
        write_values(state[key], value)


def _trained(anatomy: Anatomy, modules: Mapping[str, nn.Module], heads: Iterable[str]) -> list[str]:
    """Names of the parameters among `heads`; one that has several names once, under the first."""
    state = tensors_in(modules)
    wanted = {id(state[key]) for key in heads}
    return [name for name, parameter in anatomy.parameters.items() if id(parameter) in wanted]


def _check_whole(
    anatomy: Anatomy, modules: Mapping[str, nn.Module], folder: PeftFolder, directory: str | Path
) -> tuple[str, ...]:
    """Notes on settings that decide nothing.

    Raises:
        AdapterFileError: the configuration selects a layer that the file has no factors for.
    """
    names = {id(module): path for path, module in reversed(list(modules.items()))}
    first = {path: module for path, module in modules.items() if names[id(module)] == path}
    expected = expected_modules(folder.config, anatomy.model, first)
    parameters = [path for owned in find_stacks(anatomy.layers).values() for path, _ in owned]
    stated = folder.config.get("target_parameters") or ()
    selected = [path for path in first if path in (expected or ()) or is_target(f"{path}.weight", stated)]
    selected += [path for path in parameters if is_target(path, stated)]
    held = folder.layers.keys()  # a matrix that its owner reads stands under its own name
    missing = [path for path in selected if held.isdisjoint((path, f"{path}.weight", join(path, IN)))]
    if missing:
        raise AdapterFileError(
            f'"{directory}" has no factors for {len(missing)} layers that its {peft_rules.CONFIG} selects: '
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. The file was saved in part; save it "
            "whole, or name in target_modules, exclude_modules or layers_to_transform what it holds."
        )
    notes = dead_settings(folder.config, folder.former or folder.layers)
    if expected is None:
        notes += (f"{peft_rules.CONFIG} has no target_modules, so nothing says which layers the file should have",)
    return notes


def _refuse_variants(config: Mapping[str, Any], directory: str | Path) -> None:
    """Raise `AdapterFileError` for every setting that would make the factors mean something else."""
    if config.get("peft_type") not in (TYPE, TRIPLETS):
        raise AdapterFileError(
            f'"{directory}" has peft_type {config.get("peft_type")!r}; "{TYPE}" and "{TRIPLETS}" are read, and what an '
            f"installed method brings: {', '.join(types()) or 'nothing'}. {_MERGE_IN_PEFT}"
        )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS_THAT_KEEP_THE_BASE and not changes_base(config):
        raise AdapterFileError(
            f'"{directory}" has init_lora_weights={start!r}, with which peft changes the base weights on loading. '
            "Convert it in peft (save_pretrained with path_initial_model_for_weight_conversion), and read the result."
        )
    if config.get("bias", "none") not in ("none", *TRAINED_BIASES):
        raise AdapterFileError(f'"{directory}" has bias={config["bias"]!r}; "none", "all" and "lora_only" are read.')
    options = {key for method in _speaking(config) for key in method.peft_options}
    known = _READ | _DECIDED_BY_TENSORS | _NO_EFFECT | options | {"init_lora_weights", "bias"}
    unsupported = sorted(key for key, value in config.items() if value and key not in known)
    if unsupported:
        raise AdapterFileError(
            f'"{directory}" uses {", ".join(unsupported)}, which no installed method reads: its factors mean something '
            f"else than W + s B A. {_MERGE_IN_PEFT}"
        )


def stated_method(config: Mapping[str, Any]) -> Method:
    """The installed method that a configuration means, with what it states for all layers; biases show in tensors.

    Raises:
        PluginError: no installed method, or more than one, reads it.
    """
    rule = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    return replace(
        _reader(config)(),
        peft_rules.CONFIG,
        {
            "rank": config.get("r", peft_rules.DEFAULT_RANK),
            "alpha": float(config.get("lora_alpha", peft_rules.DEFAULT_ALPHA)),
            "dropout": config.get("lora_dropout", 0.0),
        }
        | ({"scaling_rule": rule} if config["peft_type"] == TYPE else {}),
    )


def _speaking(config: Mapping[str, Any]) -> list[type[Method]]:
    return [method for method in registry().methods.values() if method.peft_type == config["peft_type"]]


def _reader(config: Mapping[str, Any]) -> type[Method]:
    """The installed method that the configuration's options mean.

    Raises:
        PluginError: there is none, or several.
    """
    methods = _speaking(config)
    stated = {key: config[key] for method in methods for key in method.peft_options if config.get(key)}
    found = [method for method in methods if method.peft_options == stated]
    if len(found) == 1:
        return found[0]
    options = f" with {', '.join(f'{key}={value}' for key, value in stated.items())}" if stated else ""
    names = f": {', '.join(method.__name__ for method in found)}" if found else ""
    raise PluginError(
        f"{len(found)} installed methods read peft's {config['peft_type']} format{options}{names}; exactly one is "
        f"needed. Plugins: {', '.join(sorted({p.plugin for p in registry().providers.values()})) or 'none'}."
    )


def _base_layer(
    anatomy: Anatomy, modules: Mapping[str, nn.Module], path: str, layer: PeftLayer, directory: str | Path
) -> BaseLayer:
    """The layer at `path`, after its shapes were compared."""
    owner = path.partition(".base_layer.")[0]
    if isinstance(modules.get(owner), nn.MultiheadAttention):
        raise AdapterFileError(
            f'"{directory}" adapts {path}, which is no layer of {owner}, an nn.MultiheadAttention: it has '
            f"{owner}.in_proj_weight and {owner}.out_proj, and the file needs factors for both. {_MERGE_IN_PEFT}"
        )
    if path not in anatomy.layers:
        raise AdapterFileError(
            f'"{directory}" adapts {path}, which {type(anatomy.model).__name__} lacks.'
            f"{did_you_mean(path, anatomy.layers)}"
        )
    there, base_layer = anatomy.layers[path]
    if base_layer is None:
        raise AdapterFileError(
            f'"{directory}" adapts {path}, a {type(there).__name__}, which takes no adapter here. {_MERGE_IN_PEFT}'
        )
    shapes = tuple(tuple(matrix.shape) for matrix in layer.matrices)
    needed = (*base_layer.lead, layer.rank, base_layer.d_in), (*base_layer.lead, base_layer.d_out, layer.rank)
    if shapes != needed:
        raise AdapterFileError(f'"{directory}": the factors of {path} are {shapes}; the layer needs {needed}.')
    for key, values in layer.extra.items():
        needs = layer.rank if key == WEIGHTS else base_layer.d_out
        if values.numel() != needs:
            raise AdapterFileError(
                f'"{directory}": {key} of {path} has {values.numel()} numbers; the layer needs {needs}.'
            )
    _check_base(anatomy.model, path, layer, base_layer, directory)
    return base_layer


def _check_base(model: nn.Module, path: str, layer: PeftLayer, base_layer: BaseLayer, directory: str | Path) -> None:
    """Raise `AdapterFileError` unless what the file says of the layer itself is what the model has."""
    if layer.base is not None and not same(layer.base, base_layer.stored):
        raise AdapterFileError(
            f'"{directory}" carries a base weight for {path} of shape {tuple(layer.base.shape)} that differs from the '
            f"model's own, {tuple(base_layer.stored.shape)}; load the same pretrained weights first."
            f"{resize_hint(model, base_layer.stored, layer.base)}"
        )
    own = base_layer.bias
    if layer.base_bias is None:
        if layer.trains_base_bias and own is not None:
            raise AdapterFileError(
                f'"{directory}" has trained biases, but lacks that of {path}. Save it again with a newer peft.'
            )
        return
    if own is None or own.shape != layer.base_bias.shape:
        raise AdapterFileError(
            f'"{directory}" carries a bias of {path} of shape {tuple(layer.base_bias.shape)}; the model has '
            f"{'none there' if own is None else tuple(own.shape)}."
        )
    if not layer.trains_base_bias and not same(layer.base_bias, own):
        raise AdapterFileError(
            f'"{directory}" carries a bias of {path} that differs from that of the model; load the same pretrained '
            "weights first."
        )


def _settings(
    reader: type[Method],
    folder: PeftFolder,
    base_layers: Mapping[str, BaseLayer],
    attention: Collection[str],
    directory: str | Path,
) -> tuple[Method, dict[str, Method]]:
    """The method with the file's settings, as a whole and for each layer; `attention` are layers of torch's own.

    Raises:
        AdapterFileError: a bias trained, and the method has none that does.
    """
    config = folder.config
    trained = {path: layer.bias_delta(base_layers[path].bias) is not None for path, layer in folder.layers.items()}
    with_bias = {"bias": True} if any(trained.values()) else {}
    if with_bias and not any(field.name == "bias" for field in dataclasses.fields(reader)):
        raise AdapterFileError(
            f'"{directory}" has trained the bias of {next(path for path in trained if trained[path])}, which '
            f"{reader.__name__} cannot. {_MERGE_IN_PEFT}"
        )
    method = replace(stated_method(config), peft_rules.CONFIG, with_bias)
    settings = {}
    for path, layer in folder.layers.items():
        own: dict[str, Any] = {"rank": layer.rank, "alpha": float(layer.alpha)}
        if with_bias:
            own["bias"] = trained[path]
        if base_layers[path].kind == "embedding" or path in attention:
            own["dropout"] = 0.0  # peft drops nothing there either
        settings[path] = replace(method, path, own)
    return method, settings


def _fill(adapter: Adapter, layer: PeftLayer, bias: Tensor | None) -> None:
    """Write the factors of one layer, whose own bias is `bias`."""
    for factor, matrix in zip(adapter.own_factors(), layer.matrices, strict=True):
        write_values(factor, matrix)
    for key, tensor in adapter.peft_tensors().items():
        write_values(tensor, layer.extra[key])
    delta = layer.bias_delta(bias)
    if delta is not None:
        write_values(adapter.get_parameter("bias_delta"), delta)
