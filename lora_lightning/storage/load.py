"""Loading an adapter folder into a model, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import any_rank, check_name
from lora_lightning.adapters.folded import DenseUpdate, FoldedUpdate, update_like
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.distributed import put
from lora_lightning.errors import AdapterFileError, AdapterStateError, SettingsError, did_you_mean
from lora_lightning.injection.links import link
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.records import AdapterRecord, injected_root, linked_named, records, refuse_merged
from lora_lightning.injection.switches import activate
from lora_lightning.methods import Method, plain_settings
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.new_tokens import add_rows, check_same_tokens, remove_rows, vocabulary
from lora_lightning.models.paths import join, plain, starting_with, unwrap
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.storage.fingerprint import fingerprint, say_unsampled
from lora_lightning.storage.folded import folded_tensors
from lora_lightning.storage.folder import Stored, read_folder


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Read an adapter folder into a model, all or nothing; the adapter becomes the only active one.

    Onto a model without an adapter of that name the adapters are built from the file, and stay frozen like everything
    that does not train already; `set_trainable` trains them on. Onto an adapter of that name, which must have the same
    settings, its tensors are replaced, and what trains is not changed. New tokens that the adapter was trained with get
    their rows; the folder's `tokenizer/` knows them.

    Of a sharded model, which can only take tensors for an adapter that it has, every process calls this.

    Args:
        model: the base model the adapter was trained on (heads of its task included).
        directory: an adapter folder.
        name: name to load it under.

    Returns:
        The folder.

    Raises:
        AdapterFileError: missing or damaged folder; another base model; settings, keys or shapes that differ.
        AdapterStateError: the model is merged, or is sharded without an adapter of that name.
        UnknownMethodError: the plugin that provides the method is not installed.
    """
    check_name(name)
    return load_stored(model, read_folder(directory), directory, name)


def load_stored(model: nn.Module, stored: Stored, directory: str | Path, name: str = "default") -> Path:
    """As `load_adapter`, from a folder that has been read already."""
    method_class = registry().method(stored.method, where=f'"{directory}"')
    root = _root_for(model)
    anatomy = survey(root)
    had_rows = vocabulary(root) is not None
    _check_fingerprint(anatomy, stored, directory)
    if name not in records(root):
        check_ready(anatomy, name)
    if stored.vocabulary is not None:
        check_same_tokens(root, stored.vocabulary, f'"{directory}"')
        if not had_rows:
            add_rows(root, stored.vocabulary)
            anatomy = survey(root)
    try:
        _load(anatomy, stored, method_class, name, directory)
    except BaseException:
        if not had_rows:
            remove_rows(root)
        raise
    return Path(directory)


def _load(anatomy: Anatomy, stored: Stored, method_class: type[Method], name: str, directory: str | Path) -> None:
    """Put the tensors of an adapter file into a model whose base fits."""
    root = anatomy.model
    present = name in records(root)
    _check_heads(root, stored, name, directory)
    base_layers = _base_layers(anatomy, stored, directory)
    record = _record(method_class, anatomy, base_layers, stored, directory)
    if present:
        refuse_merged(anatomy.adapted)
        _check_same(records(root)[name], record, name, directory)
        adapters = {path: layer.adapter(name) for path, layer in anatomy.adapted.items() if name in layer.adapters}
    else:
        with any_rank():  # as it was saved; imported adapters may be wider than their layers
            adapters = {
                path: build_adapter(record.layers[path], path, base, stored.seed) for path, base in base_layers.items()
            }
    linked = linked_named(anatomy.model, name) if present else link(record.method, anatomy.model, adapters, stored.seed)
    modules = {plain(path): module for path, module in anatomy.modules.items()}
    _check_tensors(stored, _targets(stored, adapters, linked, modules), directory)
    updates = _folded(anatomy, stored, base_layers, directory)
    layers = anatomy.adapted
    if present:
        activate(layers.values(), [name])
    else:
        layers = place_adapters(anatomy, name, adapters, record, base_layers, linked, trainable=False)
    with torch.no_grad():
        for key, target in _targets(stored, adapters, linked, modules).items():  # heads may have become float32
            put(target.data, stored.tensors[key])
    for path, layer in layers.items():
        if name in layer.adapters:
            layer.set_folded(name, updates.get(path))


def _folded(
    anatomy: Anatomy, stored: Stored, base_layers: Mapping[str, BaseLayer], directory: str | Path
) -> dict[str, FoldedUpdate]:
    """What the adapter had folded, by path in the model."""
    found, paths = {}, {plain(path): path for path in base_layers}
    tied = anatomy.tied(base_layers)
    for path, tensors in folded_tensors(stored.tensors, stored.name).items():
        update = update_like(base_layers[paths[path]], tensors) if path in paths else None
        if update is None:
            raise AdapterFileError(f'"{directory}" does not fit: nothing of that shape can be folded on {path}.')
        if isinstance(update, DenseUpdate) and paths[path] in tied:
            raise AdapterFileError(
                f'"{directory}" holds a dense update of {path}, whose weight is shared with {tied[paths[path]][0]}, '
                "which would change too; untie it first."
            )
        for key, value in tensors.items():
            put(update.get_buffer(key), value)
        found[paths[path]] = update
    return found


def _record(
    method_class: type[Method], anatomy: Anatomy, layers: Iterable[str], stored: Stored, directory: str | Path
) -> AdapterRecord:
    """The record as `inject` would have made it, paths as they are in this model."""
    paths = {plain(path): path for path in layers}
    parameters = {plain(name): name for name in anatomy.parameters}
    try:
        method = restore_settings(method_class, "settings", stored.settings)
        layers = {
            paths[path]: restore_settings(method_class, f"layers[{path}]", {**stored.settings, **own})
            for path, own in stored.layers.items()
        }
    except SettingsError as error:
        raise AdapterFileError(f'"{directory}": {error}') from error
    trained = tuple(parameters.get(name, name) for name in stored.trained)
    every = {plain(path): path for path in anatomy.modules}
    plan = {paths.get(path, path): fields for path, fields in stored.plan.items()}
    linked = tuple(every.get(path, path) for path in stored.linked)
    return AdapterRecord(method, layers, trained, stored.seed, plan, linked)


def _check_same(own: AdapterRecord, theirs: AdapterRecord, name: str, directory: str | Path) -> None:
    """An adapter that is there takes tensors only from one of its own kind: equal shapes say too little."""
    hint = "load it under another name, or eject first"
    where = f'"{directory}"'
    if own.layers.keys() != theirs.layers.keys():
        path = min(own.layers.keys() ^ theirs.layers.keys())
        raise AdapterFileError(f'{where} adapts other layers than adapter "{name}", such as {path}; {hint}.')
    for path, method in theirs.layers.items():
        if type(method) is not type(own.layers[path]):
            kinds = f"{type(method).__name__}; adapter {name!r} is {type(own.layers[path]).__name__}"
            raise AdapterFileError(f"{where} holds {kinds}; {hint}.")
        have, want = plain_settings(own.layers[path]), plain_settings(method)
        for field in want:
            if have[field] != want[field]:
                raise AdapterFileError(
                    f'{where} has {field}={want[field]!r} on {path}; adapter "{name}" has {have[field]!r}; {hint}.'
                )
    if set(own.trained) != set(theirs.trained):
        parameter = min(set(own.trained) ^ set(theirs.trained))
        raise AdapterFileError(f'{where} trains other heads than adapter "{name}", such as {parameter}; {hint}.')


def _root_for(model: nn.Module) -> nn.Module:
    try:
        return injected_root(model)
    except AdapterStateError:
        return unwrap(model)


def _check_fingerprint(anatomy: Anatomy, stored: Stored, directory: str | Path) -> None:
    own = fingerprint(anatomy, stored.trained)
    theirs = stored.fingerprint
    if own["architecture"] != theirs["architecture"]:
        raise AdapterFileError(
            f'"{directory}" was trained on {theirs["architecture"]}; this model is {own["architecture"]}.'
        )
    if own["names"] != theirs["names"]:
        raise AdapterFileError(
            f'"{directory}" was trained on a {theirs["architecture"]} whose parameters have other names or shapes '
            f"(base: {stored.base or 'unknown'})."
        )
    if None not in (own["weights"], theirs["weights"]) and own["weights"] != theirs["weights"]:
        raise AdapterFileError(
            f'"{directory}" was trained on other base weights than this model has (base: {stored.base or "unknown"}); '
            "load the same pretrained weights first."
        )
    say_unsampled(own, theirs, anatomy.formats, stored.quantization)


def _check_heads(root: nn.Module, stored: Stored, name: str, directory: str | Path) -> None:
    for other, record in records(root).items():
        shared = {plain(parameter) for parameter in record.trained} & set(stored.trained)
        if other != name and shared:
            raise AdapterFileError(
                f'"{directory}" carries the head {sorted(shared)[0]}, which adapter "{other}" of the model has trained '
                "too; a model has one set of heads, so load it into a model of its own."
            )


def _base_layers(anatomy: Anatomy, stored: Stored, directory: str | Path) -> dict[str, BaseLayer]:
    layers = {plain(path): (path, layer.base) for path, layer in anatomy.layers.items()}
    base_layers = {}
    for path in stored.layers:
        own_path, base_layer = layers.get(path, (path, None))
        if base_layer is None:
            raise AdapterFileError(f'"{directory}" adapts {path}, which this model lacks.{did_you_mean(path, layers)}')
        base_layers[own_path] = base_layer
    return base_layers


def _targets(
    stored: Stored,
    adapters: Mapping[str, nn.Module],
    linked: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """Tensors of the model that a file replaces, by the names in the file: of adapters, what they share, and heads.

    Args:
        stored: the file.
        adapters: by layer path.
        linked: what adapters share, by the path of its owner.
        modules: every module of the model by path, without wrappers.
    """
    found: dict[str, Tensor] = {}
    for path, module in (*adapters.items(), *linked.items()):
        for key, tensor in module.state_dict(keep_vars=True).items():
            found[join(plain(path), "adapters", stored.name, key)] = tensor
    above = [join(path, "adapters", stored.name) + "." for path in (*stored.layers, *stored.linked)]
    for key in stored.tensors.keys() - starting_with(above, stored.tensors) - _folded_keys(stored):
        path, _, leaf = key.rpartition(".")
        own = _own_tensor(modules[path], leaf) if path in modules else None
        if own is not None:
            found[key] = own
    return found


def _folded_keys(stored: Stored) -> set[str]:
    return {key for key in stored.tensors if f".shifts.{stored.name}." in key}


def _own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or persistent buffer of exactly this module."""
    buffer = None if name in module._non_persistent_buffers_set else module._buffers.get(name)
    return module._parameters.get(name, buffer)


def _check_tensors(stored: Stored, targets: Mapping[str, Tensor], directory: str | Path) -> None:
    """Compare keys and shapes exactly."""
    missing = sorted((targets.keys() | set(stored.trained)) - stored.tensors.keys())
    unexpected = sorted(stored.tensors.keys() - targets.keys() - _folded_keys(stored))
    if missing or unexpected:
        first = (missing or unexpected)[0]
        raise AdapterFileError(
            f'"{directory}" does not fit: {len(missing)} tensors missing, {len(unexpected)} unexpected, '
            f"such as {first}.{did_you_mean(first, stored.tensors if missing else targets)}"
        )
    for key, target in targets.items():
        shape, needed = tuple(stored.tensors[key].shape), tuple(target.shape)
        if shape != needed:
            raise AdapterFileError(f'"{directory}": {key} has shape {shape}; the model needs {needed}.')
