"""Writing an adapter in peft's LORA format; `factors` says as what. Types of methods' own are in `own_types`.

lora_alpha = scaling * r; `use_rslora` is never needed.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.kinds import TransposedBase
from lora_lightning.adapters.low_rank import NO_BIAS
from lora_lightning.errors import ExportError
from lora_lightning.exporters.companions import saved_files, write_below
from lora_lightning.exporters.peft import experts as peft_experts
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft import torch_attention
from lora_lightning.exporters.peft.experts import Stacks
from lora_lightning.exporters.peft.factors import Factors, delta, find_factors, original, with_one_rank
from lora_lightning.exporters.peft.folder import PeftLayer
from lora_lightning.exporters.peft.former_names import names_to_write, taken_for_former
from lora_lightning.exporters.peft.fresh import verify_afresh
from lora_lightning.exporters.peft.grouped import block_diagonal
from lora_lightning.exporters.peft.heads import Heads, find_heads, whole_vocabulary
from lora_lightning.exporters.peft.keys import ROWS
from lora_lightning.exporters.peft.own_types import check_own, has_own_type, write_own
from lora_lightning.exporters.peft.rules import CONFIG, PREFIX, TENSORS, TYPE
from lora_lightning.exporters.peft.verify import Verdict, read_export
from lora_lightning.exporters.peft.verify import verify as check_export
from lora_lightning.exporters.report import Origin, Written
from lora_lightning.exporters.source import Source, check_finite
from lora_lightning.models.new_tokens import ExtendedLayer, unresized
from lora_lightning.models.paths import plain
from lora_lightning.models.untied import untied
from lora_lightning.storage.atomic import write_json

TAKES_RANK = True
"""An update without so small a form can be truncated."""


def write(source: Source, folder: Path, rank: int | None, verify: bool) -> Written:
    """Write `source` into `folder`.

    Args:
        source: the adapter.
        folder: an empty folder.
        rank: largest rank; an update that has none so small is truncated to it. None asks for the exact form.
        verify: read the files back and compare.

    Raises:
        ExportError: the update has no such form, or peft's format cannot say it.
    """
    if rank is None and has_own_type(source):
        return write_own(source, folder, verify)
    stacks = _check_layers(source)
    factors, options = find_factors(source, rank, _joined(source))
    if source.one_rank:
        factors = with_one_rank(factors)
    heads = find_heads(source)
    with_bias = any(f.bias is not None for f in factors.values())
    tensors = _adapter_tensors(source, factors, heads, stacks, with_bias)
    whole = whole_vocabulary(source)
    rows = {} if whole else {path: layer.own_rows.detach().cpu() for path, layer in _layers_with_rows(source).items()}
    tensors |= {f"{PREFIX}{path}{ROWS}": values for path, values in rows.items()}
    heads.tensors |= whole
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in heads.tensors.items()}
    check_finite("the adapter", tensors)
    own = {} if source.processor is None else saved_files(source.processor)
    write_below({**own, **source.tokenizer}, folder)
    # copies, since layers may share a factor, which the file has for each of them
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(copies, folder / TENSORS, {"format": "pt"})
    write_json(folder / CONFIG, {**_config(source, factors, heads, with_bias, rows), **options})
    difference = _verified(source, folder, factors, heads, rows) if verify else None
    discarded = {path: f.discarded for path, f in factors.items() if f.discarded}
    verdict = check_export(source, folder, bool(discarded)) if verify else Verdict("", ran=False)
    method = type(source.record.method)
    exact = "native" if method.peft_type == TYPE and method.peft_options == options else "exact LoRA"
    return Written(
        kind="truncated SVD" if discarded else exact,
        layers=len(factors),
        difference=difference,
        verified_by=verdict.by if verdict.ran else "",
        not_run="" if verdict.ran else verdict.by,
        discarded=discarded,
        notes=tuple(heads.notes + _bias_notes(source, with_bias) + _token_notes(source, bool(whole))),
    )


def check(source: Source) -> None:
    """Raise `ExportError` for what `write` will refuse whatever values are trained: layers, heads, settings."""
    if has_own_type(source):
        check_own(source)
        return
    stacks = _check_layers(source)
    factors, _ = find_factors(source, None, _joined(source))
    heads = find_heads(source)
    with_bias = any(f.bias is not None for f in factors.values())
    _adapter_tensors(source, factors, heads, stacks, with_bias)
    _config(source, factors, heads, with_bias, source.extended)


def _check_layers(source: Source) -> Stacks:
    """Parameters of experts, after layers and rows that peft has no place for were refused."""
    if not source.layers:
        raise ExportError(
            'no layer is adapted, and peft\'s format is of adapted layers; format="merged" writes the model.'
        )
    _check_rows(source)
    source.refuse_below()
    stacks = peft_experts.find_stacks(source.here(source.anatomy.layers))
    named = _paths_in_file(source, stacks)
    kept = {path: in_file for path, in_file in named.items() if in_file == path or path not in source.modules}
    taken = taken_for_former(source.host, kept.values())
    for path in (path for path, in_file in kept.items() if in_file in taken):
        raise ExportError(
            f"{path}: peft takes the name for a former one of {taken[named[path]]}, and finds no place for its factors."
            ' Exclude the layer, or use format="merged".'
        )
    return stacks


def _check_rows(source: Source) -> None:
    if source.extended and untied(source.anatomy.model) is not None:
        raise ExportError(
            f"rows of tokens of {next(iter(source.extended))} train in an untied model, and peft would tie them again. "
            'Use format="merged".'
        )
    left = unresized(source.anatomy.model)
    if left and any(layer.new_rows is not None for layer in source.extended.values()):
        raise ExportError(
            f"{type(source.host).__name__} has rows of new tokens in {left[0]}, and resize_token_embeddings of "
            'transformers, which peft needs before it loads them, makes no room there. Use format="merged".'
        )


def write_afresh(source: Source, folder: Path, written: Written, origin: Origin) -> Written:
    """What was written, after peft has opened it in a process of its own, where it is installed.

    Raises:
        ExportError: it computes something else there.
    """
    if has_own_type(source) or not (written.verified_by and importlib.util.find_spec("peft")):
        return written
    verdict = verify_afresh(source, folder, origin, bool(written.discarded))
    if verdict.ran:
        return replace(written, verified_by=verdict.by)
    return replace(written, notes=(*written.notes, f"not opened in a process of its own: {verdict.by}"))


# -- tensors -----------------------------------------------------------------------------------------------------------


def _paths_in_file(source: Source, stacks: Stacks) -> dict[str, str]:
    """Where the file has each layer's factors: under the layer's path, or an owner's for its expert parameters."""
    parameters = _expert_parameters(source)
    around = peft_experts.wrappers(stacks, parameters)
    found = {path: peft_experts.inside_wrappers(path, around) for path in source.layers}
    for key, (path, _) in peft_experts.named_in_file(stacks, parameters).items():
        owner = path.rpartition(".")[0]
        found[path] = f"{peft_experts.inside_wrappers(owner, around)}{key.removeprefix(owner)}"
    return found | names_to_write(source.host, [path for path, name in found.items() if path == name])


def _expert_parameters(source: Source) -> list[str]:
    joined = _joined(source)
    return [p for p, layer in source.layers.items() if layer.base_layer.kind == "experts" and p not in joined]


def _joined(source: Source) -> list[str]:
    """Projections that peft has in one layer, that of their nn.MultiheadAttention."""
    names = torch_attention.written_as_one(source.modules, source.layers).values()
    return [name for both in names for name in both]


def _adapter_tensors(
    source: Source, factors: Mapping[str, Factors], heads: Heads, stacks: Stacks, with_bias: bool
) -> dict[str, Tensor]:
    """Tensors of all adapted layers by their names in the file."""
    tensors: dict[str, Tensor] = {}
    _check_wrappers(source, heads, stacks)
    in_file = _paths_in_file(source, stacks)
    if with_bias:
        _check_biases(source, factors)
    attention = torch_attention.as_one(source.modules, factors)
    if attention and (with_bias or heads.biases):
        raise ExportError(
            f"{next(iter(attention))}: biases train, and peft computes an nn.MultiheadAttention without them. Train "
            'with bias=False, exclude it, or use format="merged".'
        )
    around = peft_experts.wrappers(stacks, _expert_parameters(source))
    for name, tensor in torch_attention.tensors_of(attention).items():
        tensors[f"{PREFIX}{peft_experts.inside_wrappers(name, around)}"] = tensor
    joined = _joined(source)
    for path, layer in source.layers.items():
        if path in joined:
            continue
        found = _layer_tensors(path, layer, factors[path], with_bias)
        if heads.biases and "bias" in layer.originals():  # peft trains that of an adapted layer then, too
            found.append((".base_layer.bias", layer.originals()["bias"].detach().cpu()))
        tensors |= {f"{PREFIX}{in_file[path]}{end}": tensor for end, tensor in found}
    return tensors


def _check_wrappers(source: Source, heads: Heads, stacks: Stacks) -> None:
    """Raise `ExportError` for what lies inside an owner of adapted parameters, and is wrapped or saved whole itself."""
    parameters = _expert_parameters(source)
    around = peft_experts.wrappers(stacks, parameters)
    for path in (*around, *heads.modules, *_layers_with_rows(source)):
        outer = next((owner for owner in around if path.startswith(f"{owner}.")), None)
        if outer is not None:
            there = next(name for name in parameters if name.rpartition(".")[0] == outer)
            raise ExportError(
                f"{path} lies inside {outer}, of which a parameter is adapted: peft puts a wrapper around that, and "
                f'then finds nothing inside but linear layers. Exclude {there}, or use format="merged".'
            )


def _check_biases(source: Source, factors: Mapping[str, Factors]) -> None:
    bare = any(f.bias is not None and "bias" not in source.layers[path].originals() for path, f in factors.items())
    for path, layer in source.layers.items():
        if what := NO_BIAS.get(layer.base_layer.kind):
            way_out = "Train with bias=False" if bare else 'Use format="merged"'  # which drops a bias of a bare layer
            raise ExportError(
                f"{path}: peft's lora_bias holds for all layers or none, and {what} cannot have it. {way_out}, or "
                "leave it out."
            )


def _layer_tensors(path: str, layer: AdaptedLayer, factors: Factors, with_bias: bool) -> list[tuple[str, Tensor]]:
    base, A, B = layer.base_layer, factors.A, factors.B
    if base.kind == "embedding":
        found = [(".lora_embedding_A", A), (".lora_embedding_B", B)]
    else:
        if base.kind == "conv":
            A = block_diagonal(base._store(A).expand(factors.groups, *[-1] * base.stored.dim()))
            B = B.reshape(*B.shape, *[1] * (base.stored.dim() - 2))
        if base.kind == "experts":
            A, B = peft_experts.side_by_side(A, B)
        found = [(".lora_A.weight", A), (".lora_B.weight", B)]
    for name, values in factors.extra.items():
        found.append((f".{name}", base.per_output(values)[None] if base.kind == "conv" else values))
    if with_bias:
        bias = torch.zeros(base.d_out, dtype=B.dtype) if factors.bias is None else factors.bias / factors.scaling
        found.append((".lora_B.bias", bias))
    if path.rpartition(".")[2] in peft_rules.BASE_SAVED:
        found.append((".base_layer.weight", layer.original_weight().detach().cpu()))
    return found


# -- configuration -----------------------------------------------------------------------------------------------------


def _config(
    source: Source, factors: dict[str, Factors], heads: Heads, with_bias: bool, rows: Collection[str]
) -> dict[str, Any]:
    """What differs from peft's defaults, and what is always needed."""
    saved = [*heads.modules, *peft_rules.task_heads(heads.task)]
    attention = torch_attention.as_one(source.modules, factors)
    joined = _joined(source)
    factors = {path: f for path, f in factors.items() if path not in joined}
    factors |= {path: both[0] for path, both in attention.items()}
    parameters = _expert_parameters(source)
    experts = peft_rules.renames_experts(source.host, source.here(dict.fromkeys(source.anatomy.fused)))
    more = factors if with_bias else [path for path, f in factors.items() if f.extra]
    renamed = peft_rules.as_parameters(factors, source.modules, experts, more)
    layers = [path for path in factors if path not in {*parameters, *renamed}]
    named = {path: f"{path}.weight" if path in renamed else path for path in factors}
    ranks = {named[path]: f.rank for path, f in factors.items()}
    alphas = {named[path]: _number(f.scaling * f.rank) for path, f in factors.items()}
    (rank, alpha), _ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0]
    transposed = any(isinstance(layer.base_layer, TransposedBase) for layer in source.layers.values())
    optional = {
        "task_type": heads.task,
        "base_model_name_or_path": getattr(getattr(source.host, "config", None), "_name_or_path", None),
        "rank_pattern": peft_rules.patterns_for(ranks, rank),
        "alpha_pattern": peft_rules.patterns_for(alphas, alpha),
        "fan_in_fan_out": transposed,
        "lora_bias": with_bias,
        "bias": "all" if heads.biases else None,
        "modules_to_save": heads.modules,
        "target_parameters": [*parameters, *(named[path] for path in renamed)],
        "trainable_token_indices": _token_indices(source) if rows else None,
    }
    return {
        "peft_type": TYPE,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": peft_rules.targets_for(layers, saved, source.modules, experts) if layers else [],
        **{key: value for key, value in optional.items() if value},
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _bias_notes(source: Source, with_bias: bool) -> list[str]:
    bare = [path for path, layer in source.layers.items() if with_bias and "bias" not in layer.originals()]
    return [f"{bare[0]} has no bias of its own, so peft loads this adapter but cannot merge it"] if bare else []


def _layers_with_rows(source: Source) -> dict[str, ExtendedLayer]:
    """Layers with rows of tokens, by path, but for those to which peft gives the rows of the input's embedding."""
    embedding = peft_rules.input_embedding(source.host)
    found: dict[str, ExtendedLayer] = {}
    for one in source.extended.values():
        rows = (one.new_rows, one.token_rows)
        layers = source.here(source.anatomy.extended).items()
        group = {
            plain(path): layer for path, layer in layers if layer.new_rows is rows[0] and layer.token_rows is rows[1]
        }
        tied = peft_rules.following_rows(source.host, group) if embedding in group.values() else []
        found |= {path: layer for path, layer in group.items() if path not in tied}
    return found


def _token_indices(source: Source) -> dict[str, list[int]] | list[int]:
    """Ids of tokens, by the layer that holds their rows."""
    layers = _layers_with_rows(source)
    found = {path: list(layer.own_ids) for path, layer in layers.items()}
    first = next(iter(source.extended.values()))
    alone = len(source.extended) == len(found) == 1 and first is peft_rules.input_embedding(source.host)
    return next(iter(found.values())) if alone else found


def _token_notes(source: Source, whole: bool) -> list[str]:
    new = [layer for layer in source.extended.values() if layer.new_rows is not None]
    size = max((layer.num_embeddings for layer in new), default=0)
    notes = [f"before peft loads it, the model needs room: resize_token_embeddings({size})"] if size else []
    if whole:
        notes.append("whole matrices of the vocabulary are in the file, because rows alone do not say the same in peft")
    return notes


# -- verification ------------------------------------------------------------------------------------------------------


def _verified(
    source: Source,
    folder: Path,
    factors: dict[str, Factors],
    heads: Heads,
    rows: Mapping[str, Tensor],
) -> float:
    """Largest difference between what the files say and what the adapter does, over all layers.

    Raises:
        ExportError: it is more than rounding, or a head or base weight differs in any bit.
    """
    written = read_export(source, folder)
    zeros = set(_joined(source)) - factors.keys()
    if written.layers.keys() != factors.keys() | zeros or written.heads.keys() != heads.tensors.keys():
        raise ExportError("the files do not read back: they list other layers or heads than were written.")
    for path, values in rows.items():
        if not torch.equal(written.rows.get(path, torch.empty(0)), values):
            raise ExportError(f"the rows of tokens of {path} do not read back bit for bit.")
    for name, value in written.heads.items():
        if not torch.equal(value, heads.tensors[name]):
            raise ExportError(f"{name} does not read back bit for bit.")
    if any(written.layers[path].delta().any() for path in zeros):
        raise ExportError(f"{min(zeros)} has no adapter, and the files give it one.")
    return max(_layer_difference(source, path, written.layers[path], factors[path]) for path in factors)


def _layer_difference(source: Source, path: str, written: PeftLayer, factors: Factors) -> float:
    layer, adapter = source.layers[path], source.adapter(path)
    if written.base is not None and not torch.equal(written.base, layer.original_weight().cpu()):
        raise ExportError(f"{path}: the base weight does not read back bit for bit.")
    found, (expected, noise) = written.update(original(layer).cpu()), delta(layer, source.name)
    if factors.discarded:
        lost = float((found - expected).square().sum() / expected.square().sum())
        if lost > factors.discarded * 1.001 + 1e-10:
            raise ExportError(
                f"{path}: truncation loses {lost:.3%} of the update, not {factors.discarded:.3%} as computed."
            )
        expected = factors.scaling * factors.B.double() @ factors.A.double()
    difference = float((found - expected).abs().max())
    allowed = 1e-5 * float(expected.abs().max()) + noise
    bias, expected_bias = _bias_deltas(layer, adapter, written)
    off = float((bias - expected_bias).abs().max())
    if not (difference <= allowed and off <= 1e-5 * float(expected_bias.abs().max()) + noise):
        raise ExportError(
            f"{path}: the files give an update that differs by {max(difference, off):.3g}; at most {allowed:.3g} is "
            "rounding. Nothing was put in place."
        )
    return max(difference, off)


def _bias_deltas(layer: AdaptedLayer, adapter: Adapter, written: PeftLayer) -> tuple[Tensor, Tensor]:
    """What the files and the adapter add to the layer's bias."""
    own = torch.zeros(layer.base_layer.d_out, dtype=torch.float64)
    in_files = own if written.bias is None else written.scaling * written.bias.double()
    base = layer.originals().get("bias")
    base = None if base is None else base.detach().to(layer.base_layer.device, torch.float64)
    with torch.no_grad():
        merged = adapter.merged_bias(base)
    merged = own if merged is None else merged.detach().double().cpu()
    return in_files, merged if base is None else merged - base.cpu()
