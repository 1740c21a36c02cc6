"""Putting adapters into a model and taking them out: `inject`, `eject`, and the switches between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer, check_name
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import UPDATE_TENSORS
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.errors import TargetError, did_you_mean
from lora_lightning.injection.links import attach, link
from lora_lightning.injection.plan import SKIPPED, ask_plan, ask_start, planned_settings
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.targets import Targets, select, trained_parameters
from lora_lightning.methods import Method, Plan, check_overridable, replace
from lora_lightning.models.anatomy import Heads, fused_experts
from lora_lightning.models.base_layers import check_quantized, count_numbers, kind_of, quantized_layers
from lora_lightning.models.heads import within
from lora_lightning.models.scopes import pretrained_models
from lora_lightning.models.weight_readers import weight_read_layers

if TYPE_CHECKING:
    pass
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.records import AdapterRecord, iter_adapters, records
from lora_lightning.injection.report import InjectionReport
from lora_lightning.seeds import common_seed


def inject(
    model: nn.Module,
    method: Method,
    targets: Targets = "all-linear",
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    also_train: Heads = "heads",
    name: str = "default",
    seed: int | None = None,
    probe: Probe | None = None,
    planned: Plan | None = None,
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
        probe: calibration batches, for methods whose ranks or start values depend on data.
        planned: the plan of an earlier run, whose tensors are loaded next: the method is asked for neither.

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
    quantized = dict(quantized_layers(model))
    check_quantized(quantized, trained, selection.layers)
    run_seed = common_seed() if seed is None else seed
    with (probe or Probe()).on(model, dict(selection.layers)) as bound:
        plan = ask_plan(method, model, bound.layers, bound) if planned is None else planned
        settings = settings_by_layer(method, selection.layers, overrides or {}, plan)
        selection.skip([path for path in selection.layers if path not in settings], SKIPPED)
        adapters = {
            path: build_adapter(settings[path], path, base, run_seed) for path, base in selection.layers.items()
        }
        linked = link(method, model, adapters, run_seed)
        if planned is None:
            ask_start(method, adapters, bound)
    _check_mergeable(model, method, adapters)
    notes = _notes(model, selection.layers, trained, also_train)
    record = AdapterRecord(method, settings, tuple(trained), run_seed, plan, tuple(linked))
    attach(model, name, linked)
    place_adapters(model, name, adapters, record, selection.layers)
    named = dict(model.named_parameters())
    return InjectionReport(
        name=name,
        method=method,
        layers={path: (kind_of(base), base.d_in, base.d_out) for path, base in selection.layers.items()},
        adapter_parameters=sum(p.numel() for m in (*adapters.values(), *linked.values()) for p in m.parameters()),
        trained={parameter: named[parameter].numel() for parameter in trained},
        total_parameters=count_numbers(model, quantized),
        skipped=selection.skipped,
        tied=selection.tied,
        notes=notes,
    )


def lower_adapters(model: nn.Module, name: str) -> None:
    """Turn an adapter's tensors to the dtype of the layers they are on, where that is half precision."""
    for _, layer in iter_adapters(model):
        if name in layer.adapters:
            for module in (layer.adapter(name), *layer.adapter(name).linked.values()):
                cast(Adapter | Linked, module).in_half = True
                module.to(layer.base_layer.dtype)


def ignore_adapter_buffers(root: nn.Module) -> None:
    """Keep DistributedDataParallel around `root` from overwriting buffers of adapters with the first process's.

    Masks and statistics are made equal by whoever writes them; a broadcast before each forward would undo local ones.
    Buffers that are made later are named as well, or a dense update would be sent whole for each batch. Weights in few
    bits are left out too: every process has loaded the same, and not all formats can be sent.
    """
    quantized = {f"{path}{inside}" for path, _ in quantized_layers(root) for inside in (".weight", ".base.weight")}
    ignored = [name for name, _ in root.named_parameters() if name in quantized]
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Adapter | Linked):
            parts = module.named_modules(prefix=path)
            ignored += [f"{inside}.{name}".removeprefix(".") for inside, part in parts for name in part._buffers]
        if isinstance(module, AdaptedLayer):
            ignored += [f"{prefix}shifts.{name}.{tensor}" for name in module.adapters for tensor in UPDATE_TENSORS]
    root._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]  # an attribute that the wrapper looks up


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


def _check_mergeable(model: nn.Module, method: Method, adapters: Mapping[str, Adapter]) -> None:
    """A layer that is read instead of called can only have an adapter that a merged weight states."""
    for path, owner in weight_read_layers(
        model, [p for p, adapter in adapters.items() if not adapter.mergeable]
    ).items():
        raise TargetError(
            f"{path} is read by {owner} instead of called, so its adapter would act through a merged weight; "
            f'{type(method).__name__} has none, since it depends on the input. exclude=["{path.rpartition(".")[2]}"] '
            "leaves such layers out."
        )


def settings_by_layer(
    method: Method,
    layers: Mapping[str, BaseLayer],
    overrides: Mapping[str, Mapping[str, Any]],
    plan: Plan | None = None,
) -> dict[str, Method]:
    """The method of each layer: the plan's fields, and then the overrides'; layers that the plan skips are left out.

    Raises:
        TargetError: a pattern that matches none of the layers.
        SettingsError: a field or value that the method cannot have.
    """
    settings = planned_settings(method, layers, plan or {}, overrides)
    for pattern, fields in overrides.items():
        hits = [path for path in layers if within(pattern, path)]
        if not hits:
            ends = {path.split(".")[-1] for path in layers}
            raise TargetError(
                f'overrides: "{pattern}" matches none of the {len(layers)} adapted layers.{did_you_mean(pattern, ends)}'
            )
        check_overridable(method, f'overrides["{pattern}"]', fields)
        for path in (path for path in hits if path in settings):
            settings[path] = replace(settings[path], f'overrides["{pattern}"]', fields)
    return settings


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
    read = weight_read_layers(model, layers)
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
