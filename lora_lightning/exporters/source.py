"""The adapter that is exported, and the model that names in the exported files are relative to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.errors import AdapterStateError, ExportError, did_you_mean
from lora_lightning.injection.records import AdapterRecord, injected_root, records, stack_of
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.experts import stands_for_parameter
from lora_lightning.models.new_tokens import ExtendedLayer, holds_rows, vocabulary
from lora_lightning.models.paths import join, plain

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One injected adapter, seen from `host`.

    Attributes:
        anatomy: of the module that adapters were injected into.
        prefix: what comes before a path in `host`, with a dot at its end.
        host: the Hugging Face model inside it that holds everything trained, or all of it where there is no such model.
        name: the adapter's name.
        record: what it was injected with: `record.method` holds its settings.
        layers: layers that carry the adapter, by path in `host`.
        trained: parameters of `host` that train in full, by name without wrappers.
        processor: the tokenizer or processor that the caller says goes with the model, or None.
        dtype: data type of the numbers that are written, or None for their own.
        quantize: format that a merged model is quantized in, or None.
        one_rank: whether all layers are written with one rank and one scaling, for a program that reads no other.
    """

    anatomy: Anatomy
    prefix: str
    host: nn.Module
    name: str
    record: AdapterRecord
    layers: dict[str, AdaptedLayer]
    trained: tuple[str, ...]
    processor: Any = None
    dtype: str | None = None
    quantize: str | None = None
    one_rank: bool = False

    @property
    def heads(self) -> tuple[str, ...]:
        """Those of `trained` that are no rows of tokens."""
        return tuple(name for name in self.trained if not holds_rows(name))

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules of `host` under the paths they have without adapters and wrappers; see `plain_modules`."""
        return plain_modules(self.host)

    def here(self, found: Mapping[str, T]) -> dict[str, T]:
        """What the survey has found inside `host`, by path in it."""
        start = len(self.prefix)
        return {path[start:]: value for path, value in found.items() if path.startswith(self.prefix)}

    @cached_property
    def extended(self) -> dict[str, ExtendedLayer]:
        """Layers with rows of tokens that belong to this adapter, by path; of those that share them, the first."""
        found: dict[tuple[int, int], tuple[str, ExtendedLayer]] = {}
        for path, layer in self.here(self.anatomy.extended).items():
            if any(f"{plain(path)}.{rows}" in self.trained for rows in ("new_rows", "token_rows")):
                found.setdefault((id(layer.new_rows), id(layer.token_rows)), (plain(path), layer))
        return dict(found.values())

    @property
    def rows(self) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Ids of the tokens that such a layer has rows of, and the rows, (ids, width)."""
        return {path: (layer.own_ids, layer.own_rows.detach()) for path, layer in self.extended.items()}

    @property
    def tokenizer(self) -> Mapping[str, bytes]:
        """Files of the tokenizer that knows the new tokens, by name; none where there are none."""
        added = vocabulary(self.anatomy.model)
        return added.files if added else {}

    @property
    def method(self) -> str:
        """The method's name."""
        return type(self.record.method).__name__

    @property
    def stack(self) -> tuple[str, ...]:
        """Names of the adapters below, and of this one."""
        return stack_of(self.anatomy.model, self.name)

    def refuse_below(self) -> None:
        """Raise `ExportError` for an adapter that another program would load without those below it."""
        if self.record.below:
            below = ", ".join(f'"{one.source}"' for one in self.record.below)
            raise ExportError(
                f"{self.method} was trained on top of {below}, and would be loaded without. --format merged writes all "
                "of them as one model; lora_lightning.compose adds up folders of low-rank updates as one adapter."
            )

    @property
    def export_class(self) -> str:
        """How the method says it travels."""
        return type(self.record.method).export

    def adapter(self, path: str) -> Adapter:
        """The adapter on one layer."""
        return self.layers[path].adapter(self.name)

    def check_fixed(self, path: str) -> None:
        """Raise `ExportError` if the update of a layer depends on its input, so that no fixed tensors state it."""
        if not (self.adapter(path).mergeable and type(self.record.method).mergeable):
            way = "Keep the adapter folder."
            if type(self.adapter(path)).approximation is not Adapter.approximation:
                way += (
                    " Or export lora_lightning.compose([folder], directory, approximate=True), which writes the fixed "
                    "update that comes near, and says how near."
                )
            raise ExportError(
                f'{self.method} on {path} depends on its input: its export class is "{self.export_class}", and no '
                f"fixed weights state it. {way}"
            )


def find(model: nn.Module, name: str) -> Source:
    """The adapter called `name` in `model`.

    Raises:
        AdapterStateError: there is none.
        ExportError: the model is sharded, or merged for good.
    """
    root = injected_root(model)
    known = records(root)
    if name not in known:
        raise AdapterStateError(f'no adapter "{name}".{did_you_mean(name, known)} Installed: {", ".join(known)}.')
    anatomy = survey(root)
    if anatomy.sharded:
        raise ExportError("the model is sharded; save_adapter writes it whole, and that folder can be exported.")
    if not all(layer.can_unmerge for layer in anatomy.adapted.values()):
        raise ExportError(
            "the model is merged with keep_original=False, so its base is gone; eject(model), and save the plain model."
        )
    layers = {path: layer for path, layer in anatomy.adapted.items() if name in layer.adapters}
    record = known[name]
    prefix, host = _host(anatomy, [*layers, *record.trained])
    return Source(
        anatomy=anatomy,
        prefix=prefix,
        host=host,
        name=name,
        record=record,
        layers={plain(path.removeprefix(prefix)): layer for path, layer in layers.items()},
        trained=tuple(plain(parameter.removeprefix(prefix)) for parameter in record.trained),
    )


def _host(anatomy: Anatomy, paths: Sequence[str]) -> tuple[str, nn.Module]:
    for path, model in anatomy.pretrained.items():
        prefix = f"{path}." if path else ""
        if all(inner.startswith(prefix) for inner in paths):
            return prefix, model
    return "", anatomy.model


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules under the paths they have without adapters and wrappers; an adapted layer counts as its base.

    A module that stands in several places comes under each path. A stack of experts is no module there.
    """
    found: dict[str, nn.Module] = {}
    inside = "\0"
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(inside):
            continue
        if isinstance(module, AdaptedLayer):
            inside = f"{path}."
        if not stands_for_parameter(module):
            found[plain(path)] = module.base if isinstance(module, AdaptedLayer) else module
    return found


def users(modules: Mapping[str, nn.Module], adapted: Mapping[str, AdaptedLayer]) -> dict[int, list[str]]:
    """Names under which each parameter is used, base layers under their plain names, by the parameter's id.

    Args:
        modules: what `plain_modules` gives of a model.
        adapted: its adapted layers by path.
    """
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append(join(path, leaf))
    for path, layer in adapted.items():
        if stands_for_parameter(layer):
            found.setdefault(id(layer.base_layer.stored), []).append(plain(path))
    return found


def check_finite(what: str, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> None:
    """Raise `ExportError` naming a tensor with a number that is NaN or infinite.

    Args:
        what: what the tensors are, for the message.
        tensors: what is written, by name.
        buffers: the model's own by the same names; they may be infinite, as masks and bounds of a range are, and what
            is written may be so where they are.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        fine = torch.isfinite(tensor)
        if buffers and key in buffers:
            fine |= torch.isinf(buffers[key]).to(fine.device)
        if not fine.all():
            raise ExportError(f"{what} holds values that are not finite, in {key}; nothing was written.")


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by name into a folder that is there."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
