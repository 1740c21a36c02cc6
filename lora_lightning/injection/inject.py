"""Putting adapters into a model: `inject`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from lora_lightning.adapters.base import Adapter, check_name, linked_modules
from lora_lightning.adapters.folded import UPDATE_TENSORS
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.errors import TargetError, did_you_mean
from lora_lightning.injection.also_train import check_disjoint, check_rows_free, trained_parameters
from lora_lightning.injection.links import link
from lora_lightning.injection.place import build_adapter, check_ready, place_adapters
from lora_lightning.injection.plan import SKIPPED, ask_plan, ask_start, planned_settings
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.ranks import fit_ranks
from lora_lightning.injection.records import AdapterRecord, iter_adapters
from lora_lightning.injection.report import InjectionReport, report_on
from lora_lightning.injection.statistics import layers_with_statistics
from lora_lightning.injection.targets import Targets, select
from lora_lightning.methods import Method, Plan, check_overridable, replace
from lora_lightning.models.anatomy import Anatomy, Heads, survey
from lora_lightning.models.base_layers import check_quantized
from lora_lightning.models.paths import join, within
from lora_lightning.models.token_rows import Tokens, choose_rows, room_for_rows, row_notes, row_parameters
from lora_lightning.models.untied import apart, untied_note
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
    train_tokens: Tokens = (),
    tokenizer: Any = None,
    untie: bool = False,
) -> InjectionReport:
    """Put an adapter on every matched layer of `model`, in place, and freeze the rest.

    The new adapter becomes the only active and the only trainable one.

    Args:
        model: any module; its weights are there and not sharded yet.
        method: settings of the adapter method.
        targets: "all-linear", a scope ("attention", "mixer", "mlp", "experts", "vision", "vision.mlp", ...), a list of
            name suffixes and scopes, or one regular expression. Of a vision-language model, a scope without a tower
            means the language tower. "none" leaves training to `also_train`.
        exclude: names along a path, or regular expressions for all of it, of layers to leave out.
        overrides: other settings for some layers, such as `{"layer.0": {"rank": 4, "alpha": 8}}`; later ones win.
        also_train: base parameters that train in full: "heads" (what a Hugging Face task model has outside its
            backbone, and its pooler), "all", or names.
        name: name of the adapter.
        seed: start values are a function of it and the layer's path; None takes torch's initial seed.
        probe: calibration batches, for methods whose ranks or start values depend on data.
        planned: the plan of an earlier run, whose tensors are loaded next: the method is asked for neither.
        train_tokens: texts or ids of known tokens whose rows train in the input's embedding, and in an output layer
            that shares its weight; or a mapping from names of layers to texts or ids.
        tokenizer: knows the texts of `train_tokens`.
        untie: give an output layer that shares the embedding's weight a copy of its own before anything else, so that
            each of them can be adapted, trained and merged.

    Returns:
        What matched, what trains, what was left out and why.

    Raises:
        TargetError: a pattern that matches nothing, or what it matches cannot be adapted.
        SettingsError: a setting that a layer cannot have.
        ModelError: nothing is tied, or more than an embedding and an output layer.
        AdapterStateError: the name is taken, or the model is merged, sharded already or without weights (meta device).
            The model is unchanged then.
    """
    check_name(name)
    anatomy = survey(model)
    check_ready(anatomy, name)
    run_seed = common_seed() if seed is None else seed
    with ExitStack() as stack:
        anatomy = stack.enter_context(apart(anatomy, untie))
        wanted = choose_rows(anatomy, train_tokens, tokenizer)
        check_rows_free(anatomy, wanted)
        anatomy = stack.enter_context(room_for_rows(anatomy, wanted))
        selection = select(anatomy, targets, exclude)
        trained = [*trained_parameters(anatomy, also_train), *row_parameters(anatomy, wanted)]
        check_disjoint(anatomy, selection.layers, trained)
        check_quantized(anatomy.quantized, trained, selection.layers)
        with (probe or Probe()).on(model, dict(selection.layers)) as bound:
            plan = ask_plan(method, model, bound.layers, bound) if planned is None else planned
            settings = settings_by_layer(method, selection.layers, overrides or {}, plan)
            selection.skip([path for path in selection.layers if path not in settings], SKIPPED)
            settings, cut = fit_ranks(settings, selection.layers)
            adapters = {
                path: build_adapter(settings[path], path, base, run_seed) for path, base in selection.layers.items()
            }
            linked = link(method, model, adapters, run_seed)
            if planned is None:
                ask_start(method, adapters, bound)
        _check_mergeable(anatomy, method, adapters)
        notes = [
            *_notes(anatomy, selection.layers, trained, also_train),
            *cut,
            *row_notes(anatomy, wanted),
            *untied_note(model),
        ]
        record = AdapterRecord(method, settings, tuple(trained), run_seed, plan, tuple(linked), wanted)
        place_adapters(anatomy, name, adapters, record, selection.layers, linked)
    return report_on(anatomy, name, record, adapters, selection, notes)


def lower_adapters(model: nn.Module, name: str) -> None:
    """Turn an adapter's tensors to the dtype of the layers they are on, where that is half precision."""
    for _, layer in iter_adapters(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            own: list[Adapter | Linked] = [adapter, *linked_modules([adapter])]
            for module in own:
                module.in_half = True
                module.to(layer.base_layer.dtype)


def ignore_adapter_buffers(root: nn.Module) -> None:
    """Keep DistributedDataParallel around `root` from overwriting buffers of adapters with the first process's.

    Masks and statistics are made equal by whoever writes them; a broadcast before each forward would undo local ones.
    Buffers that are made later are named as well, or all of a dense update would be sent for each batch. Quantized
    weights are left out too: every process has loaded the same, and not all formats can be sent.
    """
    anatomy = survey(root)
    quantized = {f"{path}{inside}" for path in anatomy.quantized for inside in (".weight", ".base.weight")}
    ignored = [name for name in anatomy.parameters if name in quantized]
    for path, module in anatomy.modules.items():
        if isinstance(module, Linked):
            ignored += _buffer_names(path, module)
    for path, layer in anatomy.adapted.items():
        for name, adapter in layer.adapters.items():
            ignored += _buffer_names(join(path, "adapters", name), adapter)
            ignored += [join(path, "shifts", name, tensor) for tensor in UPDATE_TENSORS]
    root._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]  # an attribute that the wrapper looks up


def _buffer_names(path: str, module: nn.Module) -> list[str]:
    """Names of all buffers below the module at `path`."""
    return [join(inside, buffer) for inside, part in module.named_modules(prefix=path) for buffer in part._buffers]


def _check_mergeable(anatomy: Anatomy, method: Method, adapters: Mapping[str, Adapter]) -> None:
    """A layer whose weight is read instead of called can only have an adapter that a merged weight states."""
    unmergeable = [path for path, adapter in adapters.items() if not adapter.mergeable]
    for path, owner in anatomy.weight_read(unmergeable).items():
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


def _notes(anatomy: Anatomy, layers: Iterable[str], trained: Sequence[str], also_train: Heads) -> list[str]:
    """What a user would ask about the injection."""
    return [
        *_statistics_notes(anatomy, trained),
        *_head_notes(anatomy, trained, also_train),
        *_read_notes(anatomy, layers),
        *_expert_notes(anatomy, layers),
    ]


def _head_notes(anatomy: Anatomy, trained: Sequence[str], also_train: Heads) -> list[str]:
    notes = []
    if not trained and also_train == "heads" and not anatomy.pretrained:
        notes.append(
            "no Hugging Face model here, so no head is known: what has no adapter stays frozen. Name it in also_train."
        )
    frozen = [name for name in trained_parameters(anatomy, "heads") if name not in trained]
    if frozen:
        head = frozen[0].rpartition(".")[0]
        notes.append(f"the head {head} stays frozen as it was loaded; also_train does not name it.")
    return notes


def _read_notes(anatomy: Anatomy, layers: Iterable[str]) -> list[str]:
    by_owner: dict[str, list[str]] = {}
    for path, owner in anatomy.weight_read(layers).items():
        by_owner.setdefault(owner, []).append(path)
    return [
        f"{len(paths)} layer{'s' * (len(paths) > 1)}, such as {paths[0]}, are read by {owner} instead of called: their "
        "adapters act through the merged weight, without dropout."
        for owner, paths in by_owner.items()
    ]


def _statistics_notes(anatomy: Anatomy, trained: Sequence[str]) -> list[str]:
    owners = {name.rpartition(".")[0] for name in trained}
    still = [path for path in layers_with_statistics(anatomy) if path not in owners]
    if not still:
        return []
    return [
        f"{len(still)} layer{'s' * (len(still) > 1)} with running statistics, such as {still[0]}, keep them, as in "
        "evaluation; also_train lets a layer and its statistics train."
    ]


def _expert_notes(anatomy: Anatomy, layers: Iterable[str]) -> list[str]:
    fused = anatomy.fused
    return [f"{len(set(fused) & set(layers))} of {len(fused)} expert tensors adapted."] if fused else []
