"""Files that were written with transformers 4, whose models had other names and one module an expert.

transformers says itself what became of a name (`get_model_conversion_mapping`). A layer that was renamed keeps its
factors; experts' factors become those of the fused parameter:

    experts.<e>.w1   A_1 (r, d_in), B_1 (m, r)       experts.gate_up_proj   A = [A_1; A_3]          (E, 2r, d_in)
    experts.<e>.w3   A_3 (r, d_in), B_3 (m, r)                              B = [B_1 0; 0 B_3]      (E, 2m, 2r)
    experts.<e>.w2   A   (r, m),    B   (d, r)       experts.down_proj      A (E, r, m), B (E, d, r)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.folder import PeftFolder, PeftLayer
from lora_lightning.models.anatomy import Anatomy


@dataclass(frozen=True)
class _Part:
    """One expert's share of a fused parameter."""

    path: str
    expert: int
    place: int
    """Which of the parameters that were put side by side it is."""
    layer: PeftLayer


def with_present_names(
    folder: PeftFolder, anatomy: Anatomy, state: Mapping[str, Tensor], directory: object
) -> PeftFolder:
    """The folder with the names that the model has now; as it is where it has these already.

    Args:
        folder: the folder's content.
        anatomy: of the plain model.
        state: its tensors, by all of their names.
        directory: the folder, for messages.

    Raises:
        AdapterFileError: experts of which some are missing, or whose parameters are fused in a way not known here.
    """
    strange = [path for path in folder.layers if path not in anatomy.layers]
    strange += [key for key in folder.heads if key not in state]
    strange += [path for path in folder.rows if f"{path}.weight" not in state]
    rename = _Renaming(anatomy.model) if strange and hasattr(anatomy.model, "config") else None
    if rename is None or not rename.known:
        return folder
    layers, parts = dict(folder.layers), dict[str, list[_Part]]()
    names: dict[str, str] = {}
    for path, layer in folder.layers.items():
        if path in anatomy.layers:
            continue
        name, part = rename.find(path, layer)
        if part is not None and name in anatomy.layers:
            parts.setdefault(name, []).append(part)
            names[path] = name
            del layers[path]
        elif name in anatomy.layers:
            layers[name] = layers.pop(path)
            names[path] = name
    for name, found in parts.items():
        layers[name] = _fused(name, found, rename.counts[name], anatomy, directory)
    heads = {_present(key, state, rename): value for key, value in folder.heads.items()}
    rows = {_present(f"{path}.weight", state, rename).removesuffix(".weight"): v for path, v in folder.rows.items()}
    config = _config(folder.config, parts) if names or parts else folder.config
    keys = _keys(folder, names, lambda key: _present(key, state, rename))
    former = tuple(folder.layers) if names else ()
    return replace(folder, config=config, layers=layers, heads=heads, rows=rows, keys=keys, former=former)


def taken_for_former(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Layers whose present name peft takes for a former one, each with the name that it makes of it.

    It reads names of factors as transformers reads those of old weights, and finds no place for such a layer's.

    Args:
        model: the whole model.
        paths: adapted layers, as they are named in the file.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return {}
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(kind) is None:
        return {}
    rename, factor = _Renaming(model), ".lora_A.default.weight"
    present = {path: rename.name(f"{path}{factor}") for path in paths}
    return {path: name.removesuffix(factor) for path, name in present.items() if not f"{path}{factor}".endswith(name)}


def names_to_write(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """For layers whose present name peft takes for a former one: a former name of which it makes the present one.

    Layers that have none are left out.

    Args:
        model: the whole model.
        paths: adapted layers, as they are named in the file.
    """
    taken = taken_for_former(model, paths)
    if not taken:
        return {}
    from transformers.core_model_loading import rename_source_key

    rename, factor, found = _Renaming(model), ".lora_A.default.weight", dict[str, str]()
    back = [entry.reverse_transform() for entry in rename.renamings if hasattr(entry, "reverse_transform")]
    for path in taken:
        key = f"{path}{factor}"
        former = [str(rename_source_key(key, [entry], [])[0]) for entry in back]
        fitting = [name for name in former if name.endswith(factor) and rename.name(name) == key]
        if fitting:
            found[path] = fitting[0].removesuffix(factor)
    return found


def with_names_of(folder: PeftFolder, names: Mapping[str, str]) -> PeftFolder:
    """The folder with layers under their present names; `names` is what `names_to_write` has given for them."""
    present = {former: path for path, former in names.items()}
    layers = {present.get(path, path): layer for path, layer in folder.layers.items()}
    keys = {(present.get(path, path), role): key for (path, role), key in folder.keys.items()}
    return replace(folder, layers=layers, keys=keys)


class _Renaming:
    """What transformers says of former names of a model."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found: list[Any] = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in found if isinstance(entry, WeightConverter)]
        self.known = bool(found)
        self.counts: dict[str, int] = {}
        """How many parameters were put side by side in a fused one."""

    def name(self, key: str) -> str:
        """The present name of a tensor that is not fused."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(key, self.renamings, [])[0])

    def find(self, path: str, layer: PeftLayer) -> tuple[str, _Part | None]:
        """The present name of a layer, with its share where several were fused."""
        from transformers.core_model_loading import rename_source_key

        renamed = self.name(f"{path}.weight")
        target, pattern = rename_source_key(renamed, [], self.converters)
        if pattern is None:
            return renamed.removesuffix(".weight"), None
        converter = next(entry for entry in self.converters if pattern in entry.source_patterns)
        kinds = [type(operation).__name__ for operation in converter.operations]
        match = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), renamed)
        if (
            match is None
            or not match.groups()
            or kinds not in (["MergeModulelist", "Concatenate"], ["MergeModulelist"])
        ):
            return path, None
        self.counts[target] = len(converter.source_patterns)
        return target, _Part(path, int(match[1]), converter.source_patterns.index(pattern), layer)


def _fused(name: str, parts: Sequence[_Part], count: int, anatomy: Anatomy, directory: object) -> PeftLayer:
    """The factors of a fused parameter, from those of its experts."""
    _, base = anatomy.layers[name]
    experts = base.lead[0] if base is not None and base.lead else 0
    found = {(part.expert, part.place): part.layer for part in parts}
    missing = [(e, i) for e in range(experts) for i in range(count) if (e, i) not in found]
    if missing or len(found) != experts * count:
        raise AdapterFileError(
            f'"{directory}" has factors for {len(found)} of {experts * count} matrices of {name}, such as '
            f"{parts[0].path}; they are one parameter here, which is adapted as a whole or not at all."
        )
    first = found[0, 0]
    if any(layer.rank != first.rank or layer.extra or layer.bias is not None for layer in found.values()):
        raise AdapterFileError(
            f'"{directory}": the experts of {name} have other ranks, or more than a pair of factors.'
        )
    A = torch.stack([torch.cat([found[e, i].A for i in range(count)]) for e in range(experts)])
    B = torch.stack(
        [
            torch.block_diag(*(found[e, i].B * (found[e, i].scaling / first.scaling) for i in range(count)))
            for e in range(experts)
        ]
    )
    return PeftLayer(A, B, None, None, first.alpha * count, first.scaling, lead=(experts,))


def _present(key: str, state: Mapping[str, Any], rename: _Renaming) -> str:
    """The present name of a tensor of the model."""
    name = key if key in state else rename.name(key)
    return name if name in state else key


def _config(config: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that select what was fused; names that have changed select nothing that could be counted."""
    fixed = dict(config)
    if config.get("layers_to_transform") is None and config.get("exclude_modules") is None:
        fused = {name.rpartition(".")[2] for name in parts}
        fixed["target_parameters"] = [*(config.get("target_parameters") or ()), *sorted(fused)]
    if isinstance(config.get("target_modules"), str):
        fixed["target_modules"] = None
    return fixed


def _keys(folder: PeftFolder, names: Mapping[str, str], present: Callable[[str], str]) -> dict[tuple[str, str], str]:
    """Names in the file, by what they belong to now; of a fused parameter the first of them."""
    keys: dict[tuple[str, str], str] = {}
    for (path, role), key in folder.keys.items():
        if role == "head":
            keys[present(path), role] = key
        elif role == "rows":
            keys[present(f"{path}.weight").removesuffix(".weight"), role] = key
        else:
            keys.setdefault((names.get(path, path), role), key)
    return keys
