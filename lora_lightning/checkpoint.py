"""The adapter folder: `save_adapter`, `load_adapter`, and what counts as an adapter's own state.

    adapter.safetensors    tensors of adapters and fully trained heads; description in its metadata; the commit point
    adapter.json           the description again, for people
    tokenizer/             where new tokens were added: the tokenizer that knows them

Tensor names are those of the model: `<path>.adapters.<name>.<tensor>`, heads under their own names, without what
torch.compile, FSDP1 or activation checkpointing put into a path.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import lora_lightning
from lora_lightning.adapters.layer import check_name
from lora_lightning.adapters.shift import DenseShift, Shift, shift_like
from lora_lightning.adapters.weights import BaseLayer
from lora_lightning.base_layers import packed_formats
from lora_lightning.errors import (
    AdapterFileError,
    AdapterStateError,
    SettingsError,
    did_you_mean,
    nearest,
)
from lora_lightning.files import as_json, write_together
from lora_lightning.fingerprint import fingerprint, say_unsampled
from lora_lightning.injection import (
    AdapterRecord,
    adapters_named,
    build,
    check_ready,
    check_unmerged,
    injected_root,
    iter_adapters,
    place,
    records,
    set_active,
)
from lora_lightning.methods import Method, plain_settings
from lora_lightning.paths import plain, starting_with, unwrap
from lora_lightning.pieces import gather, is_sharded, put
from lora_lightning.plugins import registry, restore
from lora_lightning.sharding import reshard
from lora_lightning.shifts import shift_tensors
from lora_lightning.targets import all_layers, other_users
from lora_lightning.vocabulary import Vocabulary, check_same_tokens, grow, shrink, vocabulary

FILE = "adapter.safetensors"
DESCRIPTION = "adapter.json"
TOKENIZER = "tokenizer"
SCHEMA = 1
_PARTS = ("adapters", "shifts")


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
    vocabulary: Vocabulary | None = None
    """New tokens that its rows belong to."""
    quantisation: str | None = None
    """Formats that the base weights were stored in, joined."""


def adapter_keys(model: nn.Module, name: str | None = None) -> list[str]:
    """State-dict keys that belong to adapters: all tensors below them, and heads that train in full.

    Args:
        model: a module with adapters, or one that contains it.
        name: one adapter; None for all.
    """
    return list(adapter_state(model, name))


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Tensors that belong to adapters by state-dict key, as `adapter_keys`; of a sharded model its pieces."""
    root = injected_root(model)
    prefix = next(path for path, module in model.named_modules() if module is root)
    names = list(records(root)) if name is None else [name]
    inside = tuple(f"{path}.{part}.{own}." for path, _ in iter_adapters(root) for own in names for part in _PARTS)
    heads = {parameter for adapter in names for parameter in records(root)[adapter].trained}
    owners = {parameter.rpartition(".")[0] for parameter in heads}
    buffers = {f"{owner}.{buffer}" for owner in owners for buffer, _ in root.get_submodule(owner).named_buffers()}
    state = dict(_state(root))
    own = starting_with(inside, state) | heads | buffers
    found = {f"{prefix}.{key}" if prefix else key: tensor.detach() for key, tensor in state.items() if key in own}
    return {key.replace("_fsdp_wrapped_module.", ""): tensor for key, tensor in found.items()}


def _state(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict of `root` names, where it lies; nothing is gathered."""
    for path, module in root.named_modules(remove_duplicate=False):
        persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | persistent).items():
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor


def save_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Write one adapter as a folder, atomically, after a check that it reads back as it is.

    Of a sharded model every process calls this, and the first one writes.

    Args:
        model: a model with adapters.
        directory: the folder; an adapter that is there already is replaced only when the new one is whole.
        name: which adapter.

    Returns:
        The folder.

    Raises:
        AdapterStateError: there is no such adapter, or it was merged with `keep_original=False`.
        AdapterFileError: the folder cannot be written; what was there is intact.
    """
    root = injected_root(model)
    if name not in records(root):
        raise AdapterStateError(
            f'no adapter "{name}".{did_you_mean(name, records(root))} Installed: {", ".join(records(root))}.'
        )
    reshard(root)
    state = adapter_state(root, name)
    whole = gather(list(state.values()))
    tensors = {plain(k): t.to("cpu", copy=True).contiguous() for k, t in zip(state, whole, strict=True)}
    description = describe(root, name, records(root)[name])
    folder = Path(directory)
    if is_sharded(root) and torch.distributed.get_rank() > 0:
        return folder
    content = to_bytes(tensors, {"format": "lora_lightning", "adapter": json.dumps(description)})
    _check_readable(content, tensors)

    added = vocabulary(root)
    tokenizer = {folder / TOKENIZER / file: own for file, own in (added.files if added else {}).items()}
    try:
        write_together({**tokenizer, folder / FILE: content, folder / DESCRIPTION: as_json(description)})
    except OSError as error:
        raise AdapterFileError(
            f'cannot write the adapter to "{folder}": {error.strerror or error}. What was there before is intact.'
        ) from error
    return folder


def _check_readable(content: bytes, tensors: Mapping[str, Tensor]) -> None:
    written = from_bytes(content)
    for key, tensor in tensors.items():
        if key not in written or not torch.equal(_bits(written[key]), _bits(tensor)):
            raise AdapterFileError(f"the adapter does not read back as it is ({key}); nothing was written.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def describe(root: nn.Module, name: str, record: AdapterRecord) -> dict[str, Any]:
    """The description of an adapter as plain data."""
    common, added = plain_settings(record.method), vocabulary(root)
    layers = {
        plain(path): {key: value for key, value in plain_settings(method).items() if value != common[key]}
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
        "trained": [plain(parameter) for parameter in record.trained],
        "labels": _labels(root) if record.trained else None,
        "seed": record.seed,
        "vocabulary": None if added is None else {"first": added.first, "tokens": list(added.tokens)},
        "base": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "fingerprint": fingerprint(root, record.trained),
        "quantisation": packed_formats(root),
        "versions": versions,
    }


def _labels(root: nn.Module) -> list[str] | None:
    """Class names by class number, where the model's configuration has them."""
    names = getattr(getattr(root, "config", None), "id2label", None)
    return [names[number] for number in sorted(names)] if names else None


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
        newer = content["schema_version"] > SCHEMA
        fields = {field.name for field in dataclasses.fields(Stored)} - {
            "tensors",
            "trained",
            "vocabulary",
            "quantisation",
        }
        given = {} if newer else {key: content[key] for key in fields} | {"trained": tuple(content["trained"])}
        given["vocabulary"] = _vocabulary(folder, content.get("vocabulary"))
        given["quantisation"] = content.get("quantisation")  # older files have none
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise AdapterFileError(f'"{path}" is truncated or damaged: {reason}. Save the adapter again.') from error
    if newer:
        raise AdapterFileError(
            f'"{path}" has schema version {content["schema_version"]}; this library reads up to {SCHEMA}. Update it.'
        )
    return Stored(**given, tensors=tensors)


def _vocabulary(folder: Path, content: dict[str, Any] | None) -> Vocabulary | None:
    if content is None:
        return None
    files = {path.name: path.read_bytes() for path in sorted((folder / TOKENIZER).glob("*")) if path.is_file()}
    return Vocabulary(tuple(content["tokens"]), content["first"], files)


def _missing(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f'"{folder}" holds an adapter in peft\'s format; read it with import_peft.'
    if (folder / "adapter" / FILE).is_file():
        return f'"{folder}" is a run folder; its adapter is "{folder / "adapter"}".'
    parent = folder.parent
    close = nearest(folder.name, [p.parent.name for p in parent.glob(f"*/{FILE}")]) if parent.is_dir() else []
    hint = f" Nearest: {', '.join(close)}." if close else ""
    return f'"{folder}" holds no {FILE}.{hint}'


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
    stored = read_folder(directory)
    method_class = registry().method(stored.method, where=f'"{directory}"')
    root = _root_for(model)
    present, grown = name in records(root), vocabulary(root) is not None
    reshard(root)
    _check_fingerprint(root, stored, directory)
    if not present:
        check_ready(root, name)
    if stored.vocabulary is not None:
        check_same_tokens(root, stored.vocabulary, f'"{directory}"')
        if not grown:
            grow(root, stored.vocabulary)
    try:
        return _load(root, stored, method_class, name, present, directory)
    except BaseException:
        if not grown:
            shrink(root)
        raise


def _load(
    root: nn.Module, stored: Stored, method_class: type[Method], name: str, present: bool, directory: str | Path
) -> Path:
    """Put the tensors of an adapter file into a model whose base fits."""
    _check_heads(root, stored, name, directory)
    accessors = _accessors(root, stored, directory)
    record = _record(method_class, root, accessors, stored, directory)
    if present:
        check_unmerged(root)
        _check_same(records(root)[name], record, name, directory)
        adapters = adapters_named(root, name)
    else:
        adapters = {path: build(record.layers[path], path, base, stored.seed) for path, base in accessors.items()}
    _match(root, stored, adapters, directory)
    shifts = _shifts(root, stored, accessors, directory)
    if present:
        set_active(root, [name])
    else:
        place(root, name, adapters, record, accessors, trainable=False)
    with torch.no_grad():  # heads in half precision have become others
        for target, value in _match(root, stored, adapters, directory):
            put(target, value)
    for path, layer in iter_adapters(root):
        if name in layer.adapters:
            layer.set_shift(name, shifts.get(path))
    return Path(directory)


def _shifts(
    root: nn.Module, stored: Stored, accessors: Mapping[str, BaseLayer], directory: str | Path
) -> dict[str, Shift]:
    """What the adapter had folded, by path in the model."""
    found, paths = {}, {plain(path): path for path in accessors}
    tied = {path: others for path, others in other_users(root, accessors).items() if others}
    for path, tensors in shift_tensors(stored.tensors, stored.name).items():
        shift = shift_like(accessors[paths[path]], tensors) if path in paths else None
        if shift is None:
            raise AdapterFileError(f'"{directory}" does not fit: nothing of that shape can be folded on {path}.')
        if isinstance(shift, DenseShift) and paths[path] in tied:
            raise AdapterFileError(
                f'"{directory}" holds a dense update of {path}, whose weight is shared with {tied[paths[path]][0]}, '
                "which would change too; untie it first."
            )
        for key, value in tensors.items():
            put(shift.get_buffer(key), value)
        found[paths[path]] = shift
    return found


def _record(
    method_class: type[Method], root: nn.Module, layers: Iterable[str], stored: Stored, directory: str | Path
) -> AdapterRecord:
    """The record as `inject` would have made it, paths as they are in this model."""
    paths = {plain(path): path for path in layers}
    parameters = {plain(name): name for name, _ in root.named_parameters()}
    try:
        method = restore(method_class, "settings", stored.settings)
        layers = {
            paths[path]: restore(method_class, f"layers[{path}]", {**stored.settings, **own})
            for path, own in stored.layers.items()
        }
    except SettingsError as error:
        raise AdapterFileError(f'"{directory}": {error}') from error
    return AdapterRecord(method, layers, tuple(parameters.get(name, name) for name in stored.trained), stored.seed)


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
    say_unsampled(own, theirs, packed_formats(root), stored.quantisation)


def _check_heads(root: nn.Module, stored: Stored, name: str, directory: str | Path) -> None:
    for other, record in records(root).items():
        shared = {plain(parameter) for parameter in record.trained} & set(stored.trained)
        if other != name and shared:
            raise AdapterFileError(
                f'"{directory}" carries the head {sorted(shared)[0]}, which adapter "{other}" of the model has trained '
                "too; a model has one set of heads, so load it into a model of its own."
            )


def _accessors(root: nn.Module, stored: Stored, directory: str | Path) -> dict[str, BaseLayer]:
    layers = {plain(path): (path, accessor) for path, _, accessor in all_layers(root)}
    accessors = {}
    for path in stored.layers:
        own_path, accessor = layers.get(path, (path, None))
        if accessor is None:
            raise AdapterFileError(f'"{directory}" adapts {path}, which this model lacks.{did_you_mean(path, layers)}')
        accessors[own_path] = accessor
    return accessors


def _match(
    root: nn.Module, stored: Stored, adapters: Mapping[str, nn.Module], directory: str | Path
) -> list[tuple[Tensor, Tensor]]:
    """(target, value) for every tensor, after an exact comparison of keys and shapes."""
    targets = {
        f"{plain(path)}.adapters.{stored.name}.{key}": tensor
        for path, adapter in adapters.items()
        for key, tensor in adapter.state_dict(keep_vars=True).items()
    }
    state = {plain(key): tensor for key, tensor in root.state_dict(keep_vars=True).items()}
    folded = {key for key in stored.tensors if f".shifts.{stored.name}." in key}
    inside = starting_with((f"{path}.adapters.{stored.name}." for path in stored.layers), stored.tensors) | folded
    targets |= {key: state[key] for key in stored.tensors if key not in inside and key in state}
    missing = sorted((targets.keys() | set(stored.trained)) - stored.tensors.keys())
    unexpected = sorted(stored.tensors.keys() - targets.keys() - folded)
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
    return [(target.data, stored.tensors[key]) for key, target in targets.items()]
