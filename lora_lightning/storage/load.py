"""Loading an adapter folder into a model, all or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, check_name
from lora_lightning.adapters.folded import DenseUpdate, FoldedUpdate, update_like
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.distributed import local, own_rows, put
from lora_lightning.errors import (
    AdapterFileError,
    AdapterStateError,
    LoraLightningError,
    SettingsError,
    TargetError,
    did_you_mean,
)
from lora_lightning.injection.also_train import check_rows_free
from lora_lightning.injection.heads import heads_of, show_heads
from lora_lightning.injection.links import link
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.records import (
    AdapterRecord,
    Below,
    injected_root,
    linked_named,
    note_read,
    records,
    refuse_merged,
    stack_of,
    trained_in,
)
from lora_lightning.injection.switches import activate, set_active
from lora_lightning.methods import Method, plain_settings
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.heads import classes_hint
from lora_lightning.models.meta import values_follow
from lora_lightning.models.new_tokens import add_rows, check_same_tokens, remove_rows, vocabulary
from lora_lightning.models.paths import join, plain, starting_with, unwrap
from lora_lightning.models.token_rows import put_rows, remove_token_rows, row_parameters, rows_at
from lora_lightning.models.untied import retie, untie, untied
from lora_lightning.plugins import registry, restore_settings
from lora_lightning.registry import one_line
from lora_lightning.storage.below import find_below
from lora_lightning.storage.fingerprint import (
    counted,
    has_kept_fingerprint,
    outline,
)
from lora_lightning.storage.folded import folded_tensors
from lora_lightning.storage.same_base import check_base, refuse_other_base
from lora_lightning.storage.skeleton import new_skeleton
from lora_lightning.storage.state import surveyed_state
from lora_lightning.storage.stored import Stored, read_folder


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Read an adapter folder into a model, all or nothing; the adapter becomes the only active one.

    One that was trained on top of others needs them in the model, as they were loaded, and is active with them.

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
    had_rows, was_tied = vocabulary(root) is not None, untied(root) is None
    below = find_below(root, stored, directory)
    has_values = not values_follow(root)  # else the first process, which has them, compares and sends them
    if has_values:
        with heads_of(root, []):
            check_base(anatomy, stored, trained_in(root, [one.name for one in below]), directory)
    if name not in records(root):
        check_ready(anatomy, name)
    fresh: list[str] = []
    try:
        with _blaming(directory):
            anatomy = _with_rows(anatomy, stored, directory, fresh)
            plan = _plan(anatomy, stored, method_class, name, directory, stored.seed, below)
        _place(plan, stored, name)
    except BaseException:
        remove_token_rows(root, fresh)
        if was_tied:
            retie(root)
        if not had_rows:
            remove_rows(root)
        raise
    if has_values:
        _check_loaded(root, stored, name, directory)
    note_read(root, name, stored.digest)
    if below:
        set_active(root, stack_of(root, name))
    return Path(directory)


def check_loads(anatomy: Anatomy, stored: Stored, directory: str | Path) -> None:
    """Try an adapter on a second skeleton of the model it is on: whether a plain model could load it.

    Everything is compared that needs no values. Their fingerprint is that of `stored`, and it is made sure that nothing
    counts in it that trains. Where no skeleton can be made, that is said, and nothing is compared.

    Args:
        anatomy: of the model with the adapter.
        stored: its folder, read.
        directory: the folder.

    Raises:
        AdapterFileError: a plain model could not load it.
    """
    trained = trained_in(anatomy.model, stack_of(anatomy.model, stored.name))
    if not has_kept_fingerprint(anatomy.model):  # else parameters lie in flat ones, and have no names
        trains = {id(anatomy.parameters[name]) for name in trained}
        for key, parameter in counted(anatomy, trained).items():
            if id(parameter) in trains:
                raise AdapterFileError(f'"{directory}": {key} trains, and is counted as a weight of the base model.')
    try:
        plain_one = survey(new_skeleton(anatomy))
    except Exception as error:  # whatever the modules of a project do when they are copied
        print(f'note: "{directory}" reads back from the disk, but no second model could be made to try it on: {error}')
        return
    refuse_other_base(outline(plain_one, trained), stored, directory, ("architecture", "names"))
    method_class = registry().method(stored.method, where=f'"{directory}"')
    with _blaming(directory):
        _plan(_with_rows(plain_one, stored, directory, []), stored, method_class, stored.name, directory, None)


@contextmanager
def _blaming(directory: str | Path) -> Iterator[None]:
    """An error that no one has raised on purpose, while a model is made ready for what a file states, is the file's."""
    try:
        yield
    except LoraLightningError:
        raise
    except Exception as error:
        raise AdapterFileError(f'"{directory}" states what cannot be built: {one_line(error)}.') from error


def _with_rows(anatomy: Anatomy, stored: Stored, directory: str | Path, fresh: list[str]) -> Anatomy:
    """Give the model the rows of the adapter's tokens, where it has none; `fresh` takes names of known ones' rows."""
    root = anatomy.model
    if stored.vocabulary is not None:
        check_same_tokens(root, stored.vocabulary, f'"{directory}"')
        if vocabulary(root) is None:
            add_rows(root, stored.vocabulary)
            anatomy = survey(root)
    anatomy = _as_tied(anatomy, stored, directory)
    try:
        wanted = rows_at(anatomy, stored.tokens)
        check_rows_free(anatomy, wanted)
        fresh += put_rows(anatomy, wanted)
    except (SettingsError, TargetError) as error:
        raise AdapterFileError(f'"{directory}": {error}') from error
    return survey(root) if fresh else anatomy


def _as_tied(anatomy: Anatomy, stored: Stored, directory: str | Path) -> Anatomy:
    """Untie the model where the adapter was trained on an untied one."""
    own = untied(anatomy.model)
    if own is None and stored.untied:
        own = untie(anatomy)
        anatomy = survey(anatomy.model)
    found = () if own is None else (plain(own.output),)
    if found != stored.untied:
        raise AdapterStateError(
            f'"{directory}" was trained with {", ".join(stored.untied) or "nothing"} untied; in the model '
            f"{', '.join(found)} is. Load it into a model of its own."
        )
    return anatomy


@dataclass(frozen=True)
class _Plan:
    """What a load puts where; nothing has been changed yet."""

    anatomy: Anatomy
    record: AdapterRecord
    base_layers: Mapping[str, BaseLayer]
    adapters: Mapping[str, Adapter]
    linked: Mapping[str, Linked]
    folded: Mapping[str, FoldedUpdate]


def _plan(
    anatomy: Anatomy,
    stored: Stored,
    method_class: type[Method],
    name: str,
    directory: str | Path,
    seed: int | None,
    below: tuple[Below, ...] = (),
) -> _Plan:
    """Find where each tensor of a file belongs in a model whose base fits, and build what the model lacks.

    Without a seed adapters are built without start values.
    """
    root = anatomy.model
    present = name in records(root)
    base_layers = _base_layers(anatomy, stored, directory)
    record = dataclasses.replace(_record(method_class, anatomy, base_layers, stored, directory), below=below)
    if present:
        refuse_merged(anatomy.adapted)
        _check_same(records(root)[name], record, name, directory)
        adapters = {path: layer.adapter(name) for path, layer in anatomy.adapted.items() if name in layer.adapters}
    else:
        adapters = {path: build_adapter(record.layers[path], path, base, seed) for path, base in base_layers.items()}
    linked = linked_named(root, name) if present else link(record.method, root, adapters, stored.seed)
    if "linked" in stored.description and set(map(plain, linked)) != set(stored.linked):  # 0.1 did not state it
        raise AdapterFileError(
            f'"{directory}" states that layers share what lies at {sorted(stored.linked)}; {stored.method} has it at '
            f"{sorted(map(plain, linked))} in this model."
        )
    _check_tensors(anatomy.model, stored, _targets(anatomy, stored, adapters, linked), directory)
    return _Plan(anatomy, record, base_layers, adapters, linked, _folded(anatomy, stored, base_layers, directory))


def _place(plan: _Plan, stored: Stored, name: str) -> None:
    """Put adapters on their layers, and the tensors of a file into them."""
    layers = plan.anatomy.adapted
    if name in records(plan.anatomy.model):
        activate(layers.values(), [name])
        show_heads(plan.anatomy.model, [name])
    else:
        layers = place_adapters(
            plan.anatomy, name, plan.adapters, plan.record, plan.base_layers, plan.linked, trainable=False
        )
    # looked up anew: heads may have become float32; where values follow, the process that has them sends them
    targets = {} if values_follow(plan.anatomy.model) else _targets(plan.anatomy, stored, plan.adapters, plan.linked)
    with torch.no_grad():
        for key, target in targets.items():
            put(target.data, stored.tensors[key])
    for path, layer in layers.items():
        if name in layer.adapters:
            layer.set_folded(name, plan.folded.get(path))


def _check_loaded(root: nn.Module, stored: Stored, name: str, directory: str | Path) -> None:
    """Look everything up anew that a save of this adapter would write, and compare it with the file.

    A value is as in the file, cast to the data type of its target: that of adapters, and of heads that train.
    """
    found = {}
    for key, tensor in surveyed_state(survey(root), [name]).items():
        found[_name_in_file(plain(key), name, stored.name)] = tensor
    for key in sorted(found.keys() ^ stored.tensors.keys()):
        where = "the model has it" if key in found else "the file has it"
        raise AdapterFileError(f'"{directory}": {key} was not loaded; only {where}. Load it into a new model.')
    narrowed = []
    for key, tensor in found.items():
        value = stored.tensors[key]
        if not torch.equal(local(tensor), own_rows(value, tensor).to(tensor.device, tensor.dtype)):
            raise AdapterFileError(f'"{directory}": {key} is not in the model as the file states it. Load it anew.')
        if torch.promote_types(value.dtype, tensor.dtype) != tensor.dtype:
            narrowed.append((key, value.dtype, tensor.dtype))
    for key, theirs, own in narrowed[:1]:
        types = f"{theirs} there and {own} in the model".replace("torch.", "")
        print(f'note: "{directory}": {len(narrowed)} tensors are rounded, such as {key}, which is {types}')


def _name_in_file(key: str, name: str, theirs: str) -> str:
    """A tensor's name under the name that its adapter has in the file."""
    for part in ("adapters", "shifts"):
        before, inside, tensor = f".{key}".rpartition(f".{part}.{name}.")
        if inside:
            return f"{before}.{part}.{theirs}.{tensor}"[1:]
    return key


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
                "which would change too. Train it with untie=True, which gives the output layer a weight of its own."
            )
        for key, value in tensors.items() if not values_follow(anatomy.model) else ():
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
            if own
            else method
            for path, own in stored.layers.items()
        }
    except SettingsError as error:
        raise AdapterFileError(f'"{directory}": {error}') from error
    trained = tuple(parameters.get(name, name) for name in stored.trained)
    rows = rows_at(anatomy, stored.tokens)
    for name in row_parameters(anatomy, rows):
        if name not in trained:
            raise AdapterFileError(f'"{directory}" names tokens, but {name} is none of what it has trained.')
    every = {plain(path): path for path in anatomy.modules}
    plan = {paths.get(path, path): fields for path, fields in stored.plan.items()}
    linked = tuple(every.get(path, path) for path in stored.linked)
    return AdapterRecord(method, layers, trained, stored.seed, plan, linked, rows)


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
    if {path: rows.ids for path, rows in own.tokens.items()} != {p: rows.ids for p, rows in theirs.tokens.items()}:
        raise AdapterFileError(f'{where} trains rows of other tokens than adapter "{name}"; {hint}.')
    if [one.digest for one in own.below] != [one.digest for one in theirs.below]:
        raise AdapterFileError(f'{where} was trained on top of other adapters than adapter "{name}"; {hint}.')
    if set(own.trained) != set(theirs.trained):
        parameter = min(set(own.trained) ^ set(theirs.trained))
        raise AdapterFileError(f'{where} trains other heads than adapter "{name}", such as {parameter}; {hint}.')


def _root_for(model: nn.Module) -> nn.Module:
    try:
        return injected_root(model)
    except AdapterStateError:
        return unwrap(model)


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
    anatomy: Anatomy, stored: Stored, adapters: Mapping[str, nn.Module], linked: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Tensors of the model that a file replaces, by the names in the file: of adapters, what they share, and heads.

    Of heads, parameters that train, and persistent buffers of their modules and of those inside.

    Args:
        anatomy: of the model.
        stored: the file.
        adapters: by layer path.
        linked: what adapters share, by the path of its owner.
    """
    found: dict[str, Tensor] = {}
    for path, module in (*adapters.items(), *linked.items()):
        for key, tensor in module.state_dict(keep_vars=True).items():
            found[join(plain(path), "adapters", stored.name, key)] = tensor
    modules = {plain(path): module for path, module in anatomy.modules.items()}
    owners = [f"{parameter.rpartition('.')[0]}." for parameter in stored.trained if "." in parameter]
    for key in stored.tensors.keys() - found.keys():
        path, _, leaf = key.rpartition(".")
        owner = modules.get(path)
        if owner is None:
            continue
        own: Tensor | None = None
        if key in stored.trained:
            own = owner._parameters.get(leaf)
        elif starting_with(owners, [key]) and leaf not in owner._non_persistent_buffers_set:
            own = owner._buffers.get(leaf)
        if own is not None:
            found[key] = own
    return found


def _folded_keys(stored: Stored) -> set[str]:
    return {key for key in stored.tensors if f".shifts.{stored.name}." in key}


def _check_tensors(model: nn.Module, stored: Stored, targets: Mapping[str, Tensor], directory: str | Path) -> None:
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
            raise AdapterFileError(
                f'"{directory}": {key} has shape {shape}; the model needs {needed}.'
                f"{classes_hint(model, target, stored.tensors[key]) if key in stored.trained else ''}"
            )
