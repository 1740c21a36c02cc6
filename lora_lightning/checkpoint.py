"""The adapter folder: `save_adapter`, `load_adapter`, and what counts as an adapter's own state.

    adapter.safetensors    tensors of adapters and fully trained heads; description in its metadata; the commit point
    adapter.json           the description again, for people

Tensor names are those of the model: `<path>.adapters.<name>.<tensor>`, heads under their own names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import lora_lightning
from lora_lightning.adapters.layer import AdaptedLayer, check_name
from lora_lightning.adapters.weights import BaseLayer, base_layer
from lora_lightning.errors import AdapterFileError, AdapterStateError, did_you_mean, nearest
from lora_lightning.files import write_atomically, write_json
from lora_lightning.injection import (
    AdapterRecord,
    adapters_named,
    build,
    injected_root,
    iter_adapters,
    place,
    records,
)
from lora_lightning.methods import replace
from lora_lightning.plugins import registry

FILE = "adapter.safetensors"
DESCRIPTION = "adapter.json"
SCHEMA = 1
_SAMPLE = 64
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.", "module.")


@dataclass(frozen=True)
class Stored:
    """An adapter folder, read."""

    name: str
    method: str
    settings: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    """Layer path to the settings in which it differs."""
    trained: tuple[str, ...]
    seed: int
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    base: str | None
    tensors: dict[str, Tensor]


def adapter_keys(model: nn.Module, name: str | None = None) -> list[str]:
    """State-dict keys that belong to adapters: all tensors below them, and heads that train in full.

    Args:
        model: a module with adapters, or one that contains it.
        name: one adapter; None for all.
    """
    root = injected_root(model)
    prefix = next(path for path, module in model.named_modules() if module is root)
    names = list(records(root)) if name is None else [name]
    inside = tuple(f".adapters.{adapter}." for adapter in names)
    heads = {parameter for adapter in names for parameter in records(root)[adapter].trained}
    owners = {parameter.rpartition(".")[0] for parameter in heads}
    buffers = {f"{owner}.{buffer}" for owner in owners for buffer, _ in root.get_submodule(owner).named_buffers()}
    keys = [
        key for key in root.state_dict() if any(part in f".{key}" for part in inside) or key in heads or key in buffers
    ]
    return [f"{prefix}.{key}" if prefix else key for key in keys]


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any]:
    """What identifies the base model: class, parameter names and shapes, and a hash of a fixed sample of weights.

    Sampled weights are rounded to bfloat16, so that a model loaded in half precision is recognised. `weights` is None
    where a base stores something else than floating-point numbers.

    Args:
        model: a plain module, or one with adapters (which do not count, even when merged).
        without: parameters that do not count, such as heads that train in full.
    """
    originals = {f"{path}.weight": layer.original_weight() for path, layer in iter_adapters(model)}
    skip = set(without)
    names, sample, sampled = hashlib.sha256(), hashlib.sha256(), True
    for key, parameter in sorted(_base_parameters(model)):
        if key in skip:
            continue
        names.update(f"{key}:{tuple(parameter.shape)};".encode())
        values = originals.get(key, parameter).detach().reshape(-1)
        if not values.is_floating_point():
            sampled = False
            continue
        where = torch.linspace(0, values.numel() - 1, min(_SAMPLE, values.numel())).round().long()
        sample.update(values[where.to(values.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {
        "architecture": type(model).__name__,
        "names": names.hexdigest(),
        "weights": sample.hexdigest() if sampled else None,
    }


def _base_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Base parameters under the names they have without adapters."""
    layers = [f"{path}." for path, _ in iter_adapters(model)]
    found = []
    for name, parameter in model.named_parameters():
        inside = next((layer for layer in layers if name.startswith(layer)), None)
        if inside is None:
            found.append((name, cast(Tensor, parameter)))
        elif name.startswith(f"{inside}base."):
            found.append((inside + name.removeprefix(f"{inside}base."), cast(Tensor, parameter)))
    return found


def save_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Write one adapter as a folder, atomically, and read it back.

    Args:
        model: a model with adapters.
        directory: the folder; an adapter that is there already is replaced only when the new one is whole.
        name: which adapter.

    Returns:
        The folder.

    Raises:
        AdapterStateError: there is no such adapter.
        AdapterFileError: the folder cannot be written; what was there is intact.
    """
    root = injected_root(model)
    if name not in records(root):
        raise AdapterStateError(
            f'no adapter "{name}".{did_you_mean(name, records(root))} Installed: {", ".join(records(root))}.'
        )
    record = records(root)[name]
    state = root.state_dict()
    tensors = {key: state[key].detach().to("cpu", copy=True).contiguous() for key in adapter_keys(root, name)}
    description = describe(root, name, record)
    folder = Path(directory)
    try:
        metadata = {"format": "lora_lightning", "adapter": json.dumps(description)}
        write_atomically(folder / FILE, lambda file: file.write(to_bytes(tensors, metadata)))
        write_json(folder / DESCRIPTION, description)
    except OSError as error:
        raise AdapterFileError(
            f'cannot write the adapter to "{folder}": {error.strerror or error}. What was there before is intact.'
        ) from error
    _check_written(folder, tensors)
    return folder


def describe(root: nn.Module, name: str, record: AdapterRecord) -> dict[str, Any]:
    """The description of an adapter as plain data."""
    common = dataclasses.asdict(record.method)
    layers = {
        path: {key: value for key, value in dataclasses.asdict(method).items() if value != common[key]}
        for path, method in record.layers.items()
    }
    provider = registry().providers.get(type(record.method).__name__)
    versions = {package: version(package) for package in ("torch", "transformers")}
    versions["lora_lightning"] = lora_lightning.__version__
    if provider is not None:
        versions[provider.package] = provider.version
    return {
        "schema_version": SCHEMA,
        "name": name,
        "method": type(record.method).__name__,
        "settings": common,
        "layers": layers,
        "trained": list(record.trained),
        "seed": record.seed,
        "base": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "fingerprint": fingerprint(root, record.trained),
        "versions": versions,
    }


def _check_written(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    written = read_folder(folder).tensors
    for key, tensor in tensors.items():
        if key not in written or not torch.equal(written[key].nan_to_num(), tensor.nan_to_num()):
            raise AdapterFileError(f'"{folder / FILE}" does not read back as it was written ({key}).')


def read_folder(directory: str | Path) -> Stored:
    """Read an adapter folder without a model.

    Raises:
        AdapterFileError: missing, truncated, or not an adapter of this library.
    """
    folder = Path(directory)
    path = folder / FILE
    if not path.is_file():
        raise AdapterFileError(_missing(folder))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "lora_lightning":
                raise AdapterFileError(f'"{path}" was not written by this library: its metadata lacks the format.')
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        content = json.loads(metadata["adapter"])
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise AdapterFileError(f'"{path}" is truncated or damaged: {error}. Save the adapter again.') from error
    if content["schema_version"] > SCHEMA:
        raise AdapterFileError(
            f'"{path}" has schema version {content["schema_version"]}; this library reads up to {SCHEMA}. Update it.'
        )
    known = {field.name for field in dataclasses.fields(Stored)} - {"tensors", "trained"}
    return Stored(
        **{key: value for key, value in content.items() if key in known},
        trained=tuple(content["trained"]),
        tensors={_unwrapped(key): tensor for key, tensor in tensors.items()},
    )


def _missing(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f'"{folder}" holds an adapter in peft\'s format; read it with import_peft.'
    if (folder / "adapter" / FILE).is_file():
        return f'"{folder}" is a run folder; its adapter is "{folder / "adapter"}".'
    parent = folder.parent
    close = nearest(folder.name, [p.parent.name for p in parent.glob(f"*/{FILE}")]) if parent.is_dir() else []
    hint = f" Nearest: {', '.join(close)}." if close else ""
    return f'"{folder}" holds no {FILE}.{hint}'


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS[:-1]:
        key = key.replace(wrapper, "")
    return key


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Read an adapter folder into a model, all or nothing; the adapter becomes the active one and stays frozen.

    Onto a bare model the adapters are built from the file; onto an existing adapter of that name its tensors are
    replaced. To train it on, call `set_trainable`.

    Args:
        model: the base model the adapter was trained on (heads of its task included).
        directory: an adapter folder.
        name: name to load it under.

    Returns:
        The folder.

    Raises:
        AdapterFileError: missing or damaged folder; another base model; keys or shapes that differ.
        UnknownMethodError: the plugin that provides the method is not installed.
    """
    check_name(name)
    stored = read_folder(directory)
    method_class = registry().method(stored.method, where=f'"{directory}"')
    method = replace(method_class(), f'"{directory}"', stored.settings)
    settings = {path: replace(method, f'"{directory}"', own) for path, own in stored.layers.items()}
    root = _root_for(model)
    _check_fingerprint(root, stored, directory)
    present = name in records(root)
    _check_heads(root, stored, name, directory)
    accessors = _accessors(root, stored, directory)
    if present:
        adapters = adapters_named(root, name)
        if set(adapters) != set(settings):
            raise AdapterFileError(f'"{directory}" adapts other layers than adapter "{name}" of the model.')
    else:
        adapters = {path: build(settings[path], path, base, stored.seed) for path, base in accessors.items()}
    sources = _match(root, stored, adapters, name, directory)
    if not present:
        record = AdapterRecord(method, settings, stored.trained, stored.seed)
        place(root, name, adapters, record, accessors, trainable=False)
    with torch.no_grad():
        for target, value in sources:
            target.copy_(value)
    for path in adapters:
        cast(AdaptedLayer, root.get_submodule(path)).active = (name,)
    return Path(directory)


def _root_for(model: nn.Module) -> nn.Module:
    try:
        return injected_root(model)
    except AdapterStateError:
        return model


def _check_fingerprint(root: nn.Module, stored: Stored, directory: str | Path) -> None:
    own = fingerprint(root, stored.trained)
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


def _check_heads(root: nn.Module, stored: Stored, name: str, directory: str | Path) -> None:
    for other, record in records(root).items():
        shared = set(record.trained) & set(stored.trained)
        if other != name and shared:
            raise AdapterFileError(
                f'"{directory}" carries the head {sorted(shared)[0]}, which adapter "{other}" of the model has trained '
                "too; a model has one set of heads, so load it into a model of its own."
            )


def _accessors(root: nn.Module, stored: Stored, directory: str | Path) -> dict[str, BaseLayer]:
    modules = dict(root.named_modules())
    accessors = {}
    for path in stored.layers:
        module = modules.get(path)
        accessor = module.accessor if isinstance(module, AdaptedLayer) else base_layer(module) if module else None
        if accessor is None:
            raise AdapterFileError(f'"{directory}" adapts {path}, which this model lacks.{did_you_mean(path, modules)}')
        accessors[path] = accessor
    return accessors


def _match(
    root: nn.Module, stored: Stored, adapters: Mapping[str, nn.Module], name: str, directory: str | Path
) -> list[tuple[Tensor, Tensor]]:
    """(target, value) for every tensor, after an exact comparison of keys and shapes."""
    targets = {
        f"{path}.adapters.{stored.name}.{key}": tensor
        for path, adapter in adapters.items()
        for key, tensor in adapter.state_dict(keep_vars=True).items()
    }
    state = root.state_dict(keep_vars=True)
    heads = [key for key in stored.tensors if f".adapters.{stored.name}." not in key]
    targets |= {key: state[key] for key in heads if key in state}
    missing, unexpected = sorted(targets.keys() - stored.tensors.keys()), sorted(stored.tensors.keys() - targets.keys())
    missing += [key for key in stored.trained if key not in stored.tensors]
    if missing or unexpected:
        first = (missing or unexpected)[0]
        raise AdapterFileError(
            f'"{directory}" does not fit: {len(missing)} tensors missing, {len(unexpected)} unexpected, '
            f"such as {first}.{did_you_mean(first, targets if unexpected else stored.tensors)}"
        )
    for key, target in targets.items():
        if target.shape != stored.tensors[key].shape:
            raise AdapterFileError(
                f'"{directory}": {key} has shape {tuple(stored.tensors[key].shape)}; the model needs {tuple(target.shape)}.'
            )
    return [(target.data, stored.tensors[key]) for key, target in targets.items()]
