"""Putting adapters into a model and taking them out: `inject`, `eject`, and the switches between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters import experts
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layer import AdaptedLayer, check_name
from lora_lightning.adapters.seeds import generator
from lora_lightning.adapters.shift import SHIFT_TENSORS
from lora_lightning.adapters.weights import BaseLayer, ExpertStack
from lora_lightning.base_layers import check_packed, count_numbers, kind_of, packed_layers
from lora_lightning.dequantised import Dequantised
from lora_lightning.errors import AdapterStateError, SettingsError, TargetError, did_you_mean
from lora_lightning.methods import Method, check_overridable, replace
from lora_lightning.paths import places
from lora_lightning.precision import compute_in_float32
from lora_lightning.reading import read_layers
from lora_lightning.scopes import pretrained_models
from lora_lightning.sharding import reshard
from lora_lightning.targets import (
    Heads,
    Targets,
    fused_experts,
    other_users,
    select,
    trained_parameters,
    within,
)

if TYPE_CHECKING:
    from rich.console import Group

_RECORDS = "_lora_lightning_records"
_FOLLOWS = "_lora_lightning_values_follow"


@dataclass(frozen=True)
class AdapterRecord:
    """What was injected under one adapter name; kept on the model, written into the adapter file."""

    method: Method
    layers: dict[str, Method]
    """Settings by layer path, overrides applied."""
    trained: tuple[str, ...]
    """Base parameters that train in full, by name."""
    seed: int


@dataclass(frozen=True, repr=False)
class InjectionReport:
    """What `inject` did: matched layers, what trains, what stays frozen, what was left out and why.

    `print` gives a few lines; `rich.print`, and a notebook that shows it, the table of layers.
    """

    name: str
    method: Method
    layers: dict[str, tuple[str, int, int]]
    """Path to (kind, d_in, d_out)."""
    adapter_parameters: int
    trained: dict[str, int]
    """Base parameters that train in full, with their sizes."""
    total_parameters: int
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """Numbers that train: adapters and fully trained parameters."""
        return self.adapter_parameters + sum(self.trained.values())

    @property
    def left_out(self) -> dict[str, str]:
        """Skipped layers that do not train in full either, and why."""
        return {
            path: reason
            for path, reason in self.skipped.items()
            if not any(name.startswith(f"{path}.") for name in self.trained)
        }

    def __rich__(self) -> Group:
        from lora_lightning.report import injection_table

        return injection_table(self)

    def _repr_mimebundle_(self, include: Sequence[str] = (), exclude: Sequence[str] = (), **_: Any) -> dict[str, str]:
        from rich.jupyter import JupyterMixin

        return JupyterMixin._repr_mimebundle_(cast(Any, self), include, exclude)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        share = self.trainable_parameters / max(self.total_parameters, 1)
        lines = [
            f"{type(self.method).__name__} on {len(self.layers)} layers: "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2%})"
        ]
        if self.trained:
            lines.append(f"  in full: {', '.join(self.trained)}")
        lines += [f"  left out: {path} ({reason})" for path, reason in self.left_out.items()]
        lines += [f"  tied: {path} shares its weight with {', '.join(others)}" for path, others in self.tied.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def records(model: nn.Module) -> dict[str, AdapterRecord]:
    """Adapters injected into exactly this module, by name."""
    return cast("dict[str, AdapterRecord]", model.__dict__.get(_RECORDS, {}))


def injected_root(model: nn.Module) -> nn.Module:
    """The module that `inject` was called with: `model` or the one inside it.

    Raises:
        AdapterStateError: nothing was injected.
    """
    for module in model.modules():
        if records(module):
            return module
    raise AdapterStateError(f"{type(model).__name__} has no adapters; call inject or load_adapter first.")


def inject(
    model: nn.Module,
    method: Method,
    targets: Targets = "all-linear",
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    also_train: Heads = "heads",
    name: str = "default",
    seed: int | None = None,
) -> InjectionReport:
    """Put an adapter on every matched layer of `model`, in place, and freeze the rest.

    The new adapter becomes the only active and the only trainable one.

    Args:
        model: any module; its weights are there and not sharded yet.
        method: settings of the adapter method.
        targets: "all-linear", a scope ("attention", "mixer", "mlp", "experts", "vision", "vision.mlp", ...), a list of
            name suffixes and scopes, or one regular expression. Of a vision-language model, a scope without a tower
            means the language tower.
        exclude: names along a path, or regular expressions for all of it, of layers to leave out.
        overrides: other settings for some layers, such as `{"layer.0": {"rank": 4, "alpha": 8}}`; later ones win.
        also_train: base parameters that train in full: "heads" (what a Hugging Face task model has outside its
            backbone, and its pooler), or names.
        name: name of the adapter.
        seed: start values are a function of it and the layer's path; None takes torch's initial seed.

    Returns:
        What matched, what trains, what was left out and why.

    Raises:
        TargetError: a pattern that matches nothing, or what it matches cannot be adapted.
        SettingsError: a setting that a layer cannot have.
        AdapterStateError: the name is taken, or the model is merged, sharded already or without weights (meta device).
            The model is unchanged then.
    """
    check_name(name)
    check_ready(model, name)
    selection = select(model, targets, exclude)
    trained = trained_parameters(model, also_train)
    _check_disjoint(model, selection.layers, trained)
    packed = dict(packed_layers(model))
    check_packed(packed, trained, selection.layers)
    settings = settings_by_layer(method, selection.layers, overrides or {})
    run_seed = common_seed() if seed is None else seed
    adapters = {path: build(settings[path], path, base, run_seed) for path, base in selection.layers.items()}
    _check_stated(model, method, adapters)
    notes = _notes(model, selection.layers, trained, also_train)
    record = AdapterRecord(method, settings, tuple(trained), run_seed)
    place(model, name, adapters, record, selection.layers)
    named = dict(model.named_parameters())
    return InjectionReport(
        name=name,
        method=method,
        layers={path: (kind_of(base), base.d_in, base.d_out) for path, base in selection.layers.items()},
        adapter_parameters=sum(p.numel() for adapter in adapters.values() for p in adapter.parameters()),
        trained={parameter: named[parameter].numel() for parameter in trained},
        total_parameters=count_numbers(model, packed),
        skipped=selection.skipped,
        tied=selection.tied,
        notes=notes,
    )


def lower_adapters(model: nn.Module, name: str) -> None:
    """Turn an adapter's tensors to the dtype of the layers they are on, where that is half precision."""
    for _, layer in iter_adapters(model):
        if name in layer.adapters:
            layer.adapter(name).in_half = True
            layer.adapter(name).to(layer.accessor.dtype)


def common_seed() -> int:
    """Torch's initial seed; the first process's where several run together, which start from seeds of their own."""
    seed = [torch.initial_seed()]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed)
    return seed[0]


def ignore_adapter_buffers(root: nn.Module) -> None:
    """Keep DistributedDataParallel around `root` from overwriting buffers of adapters with the first process's.

    Masks and statistics are made equal by whoever writes them; a broadcast before each forward would undo local ones.
    Buffers that are made later are named as well, or a dense update would be sent whole for each batch. Weights in few
    bits are left out too: every process has loaded the same, and not all formats can be sent.
    """
    packed = {f"{path}{inside}" for path, _ in packed_layers(root) for inside in (".weight", ".base.weight")}
    ignored = [name for name, _ in root.named_parameters() if name in packed]
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Adapter):
            parts = module.named_modules(prefix=path)
            ignored += [f"{inside}.{name}".removeprefix(".") for inside, part in parts for name in part._buffers]
        if isinstance(module, AdaptedLayer):
            ignored += [f"{prefix}shifts.{name}.{tensor}" for name in module.adapters for tensor in SHIFT_TENSORS]
    root._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]  # an attribute that the wrapper looks up


def check_ready(model: nn.Module, name: str) -> None:
    """Raise `AdapterStateError` unless an adapter called `name` can be put into `model` now."""
    if name in records(model):
        raise AdapterStateError(f'the model has an adapter "{name}" already; eject it or choose another name.')
    check_unmerged(model)
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise AdapterStateError(
                f"{path or 'the model'} ({type(module).__name__}) is peft's, and its adapters would be frozen. Take "
                "its merge_and_unload() first, or save its adapter and read that with import_peft into the plain model."
            )
        if records(module) and module is not model:
            raise AdapterStateError(
                f"{path} ({type(module).__name__}) has adapters of its own; inject into that module, or eject them."
            )
    for parameter_name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise AdapterStateError(
                "the model is sharded already; inject adapters before fully_shard, for instance in configure_model."
            )
        if parameter.is_meta and not values_follow(model):
            raise AdapterStateError(
                f"{parameter_name} is on the meta device, without a value; load the weights before injecting."
            )


def values_follow(model: nn.Module) -> bool:
    """Whether a model on the meta device will be given its values later, by the process that has read them."""
    return bool(model.__dict__.get(_FOLLOWS))


def expect_values(model: nn.Module) -> nn.Module:
    """Mark a model without values as one that will be given them, adapters included; returns it."""
    model.__dict__[_FOLLOWS] = True
    return model


def check_unmerged(model: nn.Module) -> None:
    """Raise `AdapterStateError` if an adapter is merged, and so another could not be added or replaced."""
    for path, layer in iter_adapters(model):
        if layer.merged:
            raise AdapterStateError(f"{path}: {', '.join(layer.merged)} is merged; call unmerge first.")


def _check_disjoint(model: nn.Module, layers: Iterable[str], trained: Sequence[str]) -> None:
    """A layer is adapted, or trains in full, but never both, under no adapter's name."""
    before = {parameter: name for name, record in records(model).items() for parameter in record.trained}
    owners = {parameter.rpartition(".")[0] for parameter in trained} | set(trained)
    owners_before = {parameter.rpartition(".")[0]: name for parameter, name in before.items()} | before
    for path in layers:
        if path in owners:
            raise TargetError(f"{path} would be adapted and trained in full; exclude it, or take it out of also_train.")
        if path in owners_before:
            raise TargetError(f'{path} trains in full with adapter "{owners_before[path]}"; exclude it.')


def _check_stated(model: nn.Module, method: Method, adapters: Mapping[str, Adapter]) -> None:
    """A layer that is read instead of called can only have an adapter that a merged weight states."""
    for path, owner in read_layers(model, [p for p, adapter in adapters.items() if not adapter.mergeable]).items():
        raise TargetError(
            f"{path} is read by {owner} instead of called, so its adapter would act through a merged weight; "
            f'{type(method).__name__} has none, since it depends on the input. exclude=["{path.rpartition(".")[2]}"] '
            "leaves such layers out."
        )


def settings_by_layer(
    method: Method, layers: Mapping[str, BaseLayer], overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Method]:
    """The method of each layer, overrides applied.

    Raises:
        TargetError: a pattern that matches none of the layers.
        SettingsError: a field or value that the method cannot have.
    """
    settings = dict.fromkeys(layers, method)
    for pattern, fields in overrides.items():
        hits = [path for path in layers if within(pattern, path)]
        if not hits:
            ends = {path.split(".")[-1] for path in layers}
            raise TargetError(
                f'overrides: "{pattern}" matches none of the {len(layers)} adapted layers.{did_you_mean(pattern, ends)}'
            )
        check_overridable(method, f'overrides["{pattern}"]', fields)
        for path in hits:
            settings[path] = replace(settings[path], f'overrides["{pattern}"]', fields)
    return settings


def build(method: Method, path: str, base: BaseLayer, seed: int) -> Adapter:
    """The adapter for the layer at `path`, with its start values.

    Raises:
        SettingsError: the layer cannot have these settings, naming the layer.
    """
    try:
        adapter = method.build(base)
    except SettingsError as error:
        raise SettingsError(f"{type(method).__name__} on {path}: {error}") from error
    adapter.reset(generator(seed, "init", 0, path))
    return adapter


def place(
    model: nn.Module,
    name: str,
    adapters: Mapping[str, Adapter],
    record: AdapterRecord,
    accessors: Mapping[str, BaseLayer],
    trainable: bool = True,
) -> None:
    """Put built adapters on their layers and make them the only active ones.

    With `trainable` they are the only ones that train; without, they are frozen and other adapters stay as they are.
    """
    trained_before = _trainable_names(model)
    where, ties = places(model), other_users(model, accessors)
    layers = dict(iter_adapters(model))
    for path, adapter in adapters.items():
        layer = layers.get(path)
        if layer is None:
            layer = AdaptedLayer(accessors[path])
            owner, _, leaf = path.rpartition(".")
            # a stack of experts is no module yet: its parameter stands in one place
            standing = where.get(id(layer.base)) or [(model.get_submodule(owner), leaf)]
            layer.train(layer.base.training if id(layer.base) in where else standing[0][0].training)
            put(standing, layer)
        layer.tied_to = ties.get(path, ())
        layer.add(name, adapter.train(layer.training))
    compute_in_float32({model.get_submodule(parameter.rpartition(".")[0]): None for parameter in record.trained})
    model.__dict__.setdefault(_RECORDS, {})[name] = record
    set_active(model, [name])
    set_trainable(model, [name] if trainable else trained_before)


def _trainable_names(model: nn.Module) -> list[str]:
    return [
        name
        for name in records(model)
        if any(p.requires_grad for adapter in adapters_named(model, name).values() for p in adapter.parameters())
    ]


def put(where: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Set `module` at every (parent, name), so that a layer used in several places is adapted in all of them."""
    for parent, name in where:
        if not experts.stands_for_parameter(module):
            setattr(parent, name, module)
        elif isinstance(module, AdaptedLayer):
            experts.install(parent, name, module)
        else:
            experts.restore(parent, name, cast(ExpertStack, module))


def _notes(model: nn.Module, layers: Iterable[str], trained: Sequence[str], also_train: Heads) -> tuple[str, ...]:
    notes = []
    if not trained and also_train == "heads" and not pretrained_models(model):
        notes.append(
            "no Hugging Face model here, so no head is known: what has no adapter stays frozen. Name it in also_train."
        )
    frozen = [name for name in trained_parameters(model, "heads") if name not in trained]
    if frozen:
        head = frozen[0].rpartition(".")[0]
        notes.append(f"the head {head} stays frozen as it was loaded; also_train does not name it.")
    read = read_layers(model, layers)
    for owner, count in Counter(read.values()).items():
        first = next(path for path, cls in read.items() if cls == owner)
        notes.append(
            f"{count} layer{'s' * (count > 1)}, such as {first}, are read by {owner} instead of called: their adapters "
            "act through the merged weight, without dropout."
        )
    fused = fused_experts(model)
    if fused:
        notes.append(f"{len(set(fused) & set(layers))} of {len(fused)} expert tensors adapted.")
    for name, record in records(model).items():
        shared = [parameter for parameter in trained if parameter in record.trained]
        if shared:
            notes.append(
                f'{shared[0]} trains with adapter "{name}" too; a model has one set of heads, so save that first.'
            )
    return tuple(notes)


def iter_adapters(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Paths and adapted layers; one that stands in several places comes once."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Adapters of one name by layer path."""
    return {path: layer.adapter(name) for path, layer in iter_adapters(model) if name in layer.adapters}


def trainable_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Adapters with a trainable parameter, by their own module path."""
    return {
        f"{path}.adapters.{name}": cast(Adapter, adapter)
        for path, layer in iter_adapters(model)
        for name, adapter in layer.adapters.items()
        if any(p.requires_grad for p in adapter.parameters())
    }


def _known(root: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    known = records(root)
    for name in names:
        if name not in known:
            raise AdapterStateError(f'no adapter "{name}".{did_you_mean(name, known)} Installed: {", ".join(known)}.')
    return tuple(names)


def set_active(model: nn.Module, names: Sequence[str] | str) -> None:
    """Apply exactly these adapters, in this order; what trains is not changed.

    Raises:
        AdapterStateError: an unknown name or one given twice, adapters that cannot be stacked, or a merged layer. What
            was active stays so.
    """
    wanted = _known(injected_root(model), [names] if isinstance(names, str) else names)
    layers = [(layer, tuple(n for n in wanted if n in layer.adapters)) for _, layer in iter_adapters(model)]
    reshard(model)
    for layer, here in layers:
        if layer.merged and layer.merged != here:
            raise AdapterStateError(f"{', '.join(layer.merged)} is merged; call unmerge before another set is active.")
        layer.check_active(here)
    for layer, here in layers:
        layer.active = here


def set_trainable(model: nn.Module, names: Sequence[str] | str) -> None:
    """Train exactly these adapters and the base parameters that go with them; freeze everything else.

    Raises:
        AdapterStateError: an unknown name.
    """
    root = injected_root(model)
    wanted = _known(root, [names] if isinstance(names, str) else names)
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    for name in wanted:
        for adapter in adapters_named(root, name).values():
            for parameter in adapter.parameters():
                parameter.requires_grad_(True)
        for parameter_name in records(root)[name].trained:
            root.get_parameter(parameter_name).requires_grad_(True)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model's function inside the `with` block; heads that train in full keep their values.

    Merged adapters are taken out for the time of the block.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`.
    """
    reshard(model)
    layers = [layer for _, layer in iter_adapters(model)]
    merged = [layer for layer in layers if layer.merged]
    stuck = [layer for layer in merged if not layer.can_unmerge]
    if stuck:
        raise AdapterStateError("merged with keep_original=False; the base model's function is gone.")
    before = [layer.disabled for layer in layers]
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        reshard(model)
        for layer, was in zip(layers, before, strict=True):
            layer.disabled = was
        for layer in merged:
            layer.merge()


def merge(model: nn.Module, keep_original: bool = True) -> None:
    """Write the active adapters into the base weights, all or none.

    A layer in few bits is not written: a plain one, dequantised once, stands in its place, and what that changes is
    printed.

    Args:
        model: a model with adapters.
        keep_original: keep each original weight (on the CPU; a layer in few bits where it is), so that `unmerge`
            restores it bit for bit.

    Raises:
        AdapterStateError: no adapter is active; one is routed, not finite or too large for the weight's dtype; or a
            weight is shared with another module. Nothing is merged then.
    """
    reshard(model)
    layers = dict(iter_adapters(injected_root(model)))
    if not any(layer.active for layer in layers.values()):
        raise AdapterStateError("no adapter is active, so there is nothing to merge; call set_active first.")
    for path, layer in layers.items():
        if layer.tied_to and layer.active:
            raise AdapterStateError(
                f"{path} shares its weight with {', '.join(layer.tied_to)}, which a merge would change too; "
                "keep the adapter unmerged, or untie the weight first."
            )
        try:
            layer.check_mergeable()
        except AdapterStateError as error:
            raise AdapterStateError(f"{path}: {error} Nothing was merged.") from error
    dequantised = Dequantised()
    for path, layer in layers.items():
        dequantised.merge(path, layer, keep_original)
    if dequantised.layers:
        print(dequantised)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights, restoring them bit for bit; does nothing where none is merged.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`. Nothing is restored then.
    """
    reshard(model)
    layers = [layer for _, layer in iter_adapters(injected_root(model))]
    if any(not layer.can_unmerge for layer in layers):
        raise AdapterStateError("merged with keep_original=False; the original weights are gone.")
    for layer in layers:
        layer.unmerge()


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all of them, off the model.

    With the last adapter the plain layers come back: with their original weights, or, where they were merged with
    `keep_original=False`, with the merged ones. Heads that trained in full keep their values; nothing is unfrozen, and
    no other adapter becomes active.

    Raises:
        AdapterStateError: no such adapter, or one of several that were merged with `keep_original=False`.
    """
    root = injected_root(model)
    reshard(root)
    names = _known(root, list(records(root)) if name is None else [name])
    layers = dict(iter_adapters(root))
    for path, layer in layers.items():
        if name is not None and not layer.can_unmerge:
            raise AdapterStateError(f"{path}: merged with keep_original=False; eject all adapters or none.")
    where = places(root)
    for layer in layers.values():
        if layer.can_unmerge:
            layer.unmerge()
        layer.merged = ()
        for adapter_name in names:
            if adapter_name in layer.adapters:
                layer.remove(adapter_name)
        if not layer.adapters:
            put(where[id(layer)], layer.base)
    for adapter_name in names:
        del records(root)[adapter_name]
