"""Methods with a type of their own in peft, beside LORA: their folders, written and read.

Such a method names the type in `Method.peft_type` and its settings there in `Method.peft_fields`; its adapters state
all of their tensors in `Adapter.peft_tensors`. A tensor lies at `base_model.model.<path>.<name>`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.adapters.base import write_values
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.companions import saved_files, write_below
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.folder import PeftFolder
from lora_lightning.exporters.peft.former_names import taken_for_former
from lora_lightning.exporters.peft.heads import find_heads
from lora_lightning.exporters.peft.plain_copy import CopyError, plain_copy
from lora_lightning.exporters.peft.read_heads import find_heads as heads_in_file
from lora_lightning.exporters.peft.read_heads import same, tensors_in, tensors_of
from lora_lightning.exporters.peft.rules import CONFIG, PREFIX, TENSORS, TYPE
from lora_lightning.exporters.peft.sample_inputs import sample_inputs
from lora_lightning.exporters.peft.selection import expected_modules
from lora_lightning.exporters.peft.triplets import TRIPLETS
from lora_lightning.exporters.peft.verify import Verdict, compare, load_with_peft, not_opened, only, outputs, version
from lora_lightning.exporters.report import Written
from lora_lightning.exporters.source import Source, check_finite, plain_modules
from lora_lightning.injection.merge_model import eject
from lora_lightning.injection.place import build_adapter, place_adapters
from lora_lightning.injection.records import AdapterRecord, injected_root
from lora_lightning.injection.report import InjectionReport, report_on
from lora_lightning.injection.targets import Selection
from lora_lightning.methods import Method, replace
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.meta import is_counted
from lora_lightning.plugins import registry

_OF_CORE = ("", TYPE, TRIPLETS)
_SELECTS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_NO_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "peft_type", "peft_version",
    "revision", "runtime_config", "task_type",
)  # fmt: skip


def types() -> dict[str, type[Method]]:
    """Installed methods by their type, those whose format core reads left out."""
    return {m.peft_type: m for m in registry().methods.values() if m.peft_type not in _OF_CORE}


def has_own_type(source: Source) -> bool:
    """Whether the method of an adapter has one."""
    return type(source.record.method).peft_type not in _OF_CORE


# -- writing -----------------------------------------------------------------------------------------------------------


def check_own(source: Source) -> None:
    """Raise `ExportError` for what the method's type of peft cannot say, whatever values are trained."""
    kind, host = type(source.record.method).peft_type, type(source.host).__name__
    source.refuse_below()
    if not source.layers:
        raise ExportError("no layer is adapted, and peft's format is of adapted layers.")
    if source.extended:
        raise ExportError(f'rows of tokens train, which peft\'s {kind} has no place for. Use format="merged".')
    taken = taken_for_former(source.host, source.layers)
    for path, layer in source.layers.items():
        reason = peft_rules.unlike(path, source.modules, layer.base)
        if not isinstance(layer.base, nn.Linear):
            reason = f"it is a {type(layer.base).__name__}, and peft's {kind} is of nn.Linear alone"
        if source.name in layer.shifts:
            reason = f"peft's {kind} has no place for the updates of earlier stages, which are folded into the layer"
        if path in taken:
            reason = f"peft takes its name for a former one of {taken[path]} in {host}"
        if reason:
            raise ExportError(f'{path} cannot travel as {kind}: {reason}. Use format="merged" or "delta".')
    _settings(source)


def _settings(source: Source) -> dict[str, Any]:
    """The method's entries of the configuration.

    Raises:
        ExportError: layers differ in one.
    """
    method = source.record.method
    found: dict[str, Any] = {}
    for field, entry in type(method).peft_fields.items():
        values = {path: getattr(own, field) for path, own in source.record.layers.items()}
        if len(set(values.values())) > 1:
            differing = ", ".join(f"{path}: {value}" for path, value in list(values.items())[:3])
            raise ExportError(
                f"{field} differs between layers ({differing}), and peft's {type(method).peft_type} has one {entry} "
                'for all. Use format="merged" or "delta".'
            )
        found[entry] = next(iter(values.values()))
    return found


def write_own(source: Source, folder: Path, verify: bool) -> Written:
    """Write `source` into `folder` in its method's type.

    Raises:
        ExportError: the type cannot say it, or the files do not read back.
    """
    check_own(source)
    heads, kind = find_heads(source), type(source.record.method).peft_type
    if heads.biases:
        raise ExportError(f'{heads.biases[0]} trains, and peft\'s {kind} trains no biases. Use format="merged".')
    tensors = {
        f"{PREFIX}{path}.{key}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for path in source.layers
        for key, tensor in source.adapter(path).peft_tensors().items()
    }
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in heads.tensors.items()}
    check_finite("the adapter", tensors)
    write_below({} if source.processor is None else saved_files(source.processor), folder)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    saved = [*heads.modules, *peft_rules.task_heads(heads.task)]
    stated = {
        "peft_type": kind,
        **_settings(source),
        "target_modules": peft_rules.targets_for(list(source.layers), saved, source.modules, experts=False),
        "task_type": heads.task,
        "base_model_name_or_path": getattr(getattr(source.host, "config", None), "_name_or_path", None),
        "modules_to_save": heads.modules,
    }
    peft_file.write_config(folder, {key: value for key, value in stated.items() if value not in (None, [], "")})
    verdict = Verdict("", ran=False)
    if verify:
        read = peft_file.read_tensors(folder, values=True)
        if read.keys() != tensors.keys() or not all(torch.equal(read[key], tensors[key]) for key in tensors):
            raise ExportError("the files do not read back bit for bit.")
        verdict = _opened(source, folder)
    return Written(
        kind="native",
        layers=len(source.layers),
        difference=0.0 if verify else None,
        verified_by=verdict.by if verdict.ran else "",
        not_run="" if verdict.ran else verdict.by,
        notes=tuple(heads.notes),
    )


def _opened(source: Source, folder: Path) -> Verdict:
    """What peft computes from the files on the base model, compared with the adapter."""
    if importlib.util.find_spec("peft") is None:
        return Verdict("peft is not installed", ran=False)
    try:
        with plain_copy(source, []) as base:
            inputs = sample_inputs(base)
            if inputs is None:
                return Verdict(f"inputs of {type(source.host).__name__} are not known", ran=False)
            with only(source):
                expected = outputs(source.host, inputs)
            return compare(expected, outputs(load_with_peft(base, folder), inputs), version())
    except CopyError as error:
        return Verdict(str(error), ran=False)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(not_opened(version(), error)) from error


# -- reading -----------------------------------------------------------------------------------------------------------


def read_own(anatomy: Anatomy, config: Mapping[str, Any], directory: str | Path, name: str) -> InjectionReport:
    """Inject the adapter of such a folder; all or nothing.

    Raises:
        AdapterFileError: a setting or a tensor that the method does not have, or one that is missing.
        SettingsError: a value that the method cannot have.
    """
    cls = types()[config["peft_type"]]
    entries = dict(cls.peft_fields)
    unknown = sorted(k for k, v in config.items() if v and k not in (*_SELECTS, *_NO_EFFECT, *entries.values()))
    unknown = [key for key in unknown if (key, config[key]) != ("bias", "none")]
    if unknown:
        raise AdapterFileError(f'"{directory}" uses {", ".join(unknown)}, which {cls.__name__} does not read.')
    stated = {field: config[entry] for field, entry in entries.items() if entry in config}
    method = replace(
        cls(), CONFIG, {f: float(v) if isinstance(getattr(cls(), f), float) else v for f, v in stated.items()}
    )
    tensors = peft_file.read_tensors(Path(directory), values=not is_counted(anatomy.model))
    foreign = next((key for key in tensors if not key.startswith(PREFIX)), None)
    if foreign:
        raise AdapterFileError(f'"{directory}": {foreign} is no name that save_pretrained of peft gives.')
    values, modules = {key.removeprefix(PREFIX): value for key, value in tensors.items()}, plain_modules(anatomy.model)
    own = tensors_in(modules)
    bases = {
        path: base
        for path, (_, base) in anatomy.layers.items()
        if base is not None and any(key.startswith(f"{path}.") and key not in own for key in values)
    }
    seed = torch.initial_seed()
    adapters = {path: build_adapter(method, path, base, seed) for path, base in bases.items()}
    targets = {
        f"{p}.{key}": tensor for p, adapter in adapters.items() for key, tensor in adapter.peft_tensors().items()
    }
    first = {id(module): path for path, module in reversed(list(modules.items()))}
    named = {path: module for path, module in modules.items() if first[id(module)] == path}
    selected = expected_modules(config, anatomy.model, named) or set()
    _check_tensors(values, targets, selected - bases.keys(), directory)
    folder = PeftFolder(dict(config), {}, {key: value for key, value in values.items() if key not in targets})
    heads = heads_in_file(anatomy, modules, folder, directory)
    wanted = {id(own[key]) for key in heads}
    trained = tuple(key for key, parameter in anatomy.parameters.items() if id(parameter) in wanted)
    record = AdapterRecord(method, dict.fromkeys(adapters, method), trained, seed)
    before = {key: own[key].detach().clone() for key in heads}
    layers = place_adapters(anatomy, name, adapters, record, bases, linked={})
    try:
        for key, target in targets.items():
            write_values(target, values[key])
        _write(anatomy, heads)
        now = {**tensors_of(injected_root(anatomy.model)), **targets}
        for key in (*targets, *heads):
            if not same(values[key], now[key]):
                raise AdapterFileError(f'"{directory}": {key} is not what the model holds after the import.')
    except BaseException:
        _write(anatomy, before)
        eject(anatomy.model, name)
        raise
    tied = {path: layers[path].tied_to for path in adapters if layers[path].tied_to}
    return report_on(anatomy, name, record, adapters, Selection(bases, tied=tied), ())


def _write(anatomy: Anatomy, values: Mapping[str, Tensor]) -> None:
    state = tensors_of(injected_root(anatomy.model))  # anew: those in half precision are replaced when they train
    for key, value in values.items():
        write_values(state[key], value)


def _check_tensors(
    values: Mapping[str, Tensor], targets: Mapping[str, Tensor], missing: Iterable[str], directory: object
) -> None:
    """Raise `AdapterFileError` unless the file has all tensors of the adapters, in their shapes, and all its layers."""
    if not targets:
        raise AdapterFileError(f'"{directory}" has tensors for none of the layers of this model.')
    lacking = [*missing, *(key for key in targets if key not in values)]
    if lacking:
        raise AdapterFileError(f'"{directory}" lacks the tensors of {lacking[0]}, which its {CONFIG} promises.')
    for key, target in targets.items():
        if values[key].shape != target.shape:
            raise AdapterFileError(
                f'"{directory}": {key} has shape {tuple(values[key].shape)}; the layer needs {tuple(target.shape)}.'
            )
