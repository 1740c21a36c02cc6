"""Each layer's update as factors in peft's LORA format, and the options with which they state it.

A method with options in that format (`Method.peft_options`) is written as it is where every layer is one factor pair
and the tensors that belong to the options. Any other update needs an exact low-rank form, or is truncated.

Factors keep their own values where the adapter states a pair; otherwise the scaling is folded into B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.keys import MAGNITUDE
from lora_lightning.exporters.peft.rules import TYPE
from lora_lightning.exporters.source import Source


@dataclass(frozen=True)
class Factors:
    """One layer's update, scaling * B @ A."""

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None
    """Whole, its scaling included."""
    discarded: float = 0.0
    """Fraction of the update's energy that a truncation left out."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors beside the factors, (d_out,), by their names in the format."""
    groups: int = 1
    """Of a convolution; there peft's factors are as many times as wide."""

    @property
    def rank(self) -> int:
        """Inner width in the file."""
        return self.A.shape[-2] * self.groups


def find_factors(
    source: Source, rank: int | None, joined: Collection[str] = ()
) -> tuple[dict[str, Factors], Mapping[str, object]]:
    """Factors by layer, and the options of the method's own that they need.

    Args:
        source: the adapter.
        rank: largest rank; an update that has none so small is truncated to it. None asks for the exact form.
        joined: layers that peft has inside one of its own.

    Raises:
        ExportError: the update has no such form, or peft's layer would compute something else.
    """
    for path in source.layers:
        _check_layer(source, path, joined)
    found = {path: _own_factors(source, path) for path in source.layers}
    own = {path: factors for path, factors in found.items() if isinstance(factors, Factors)}
    if len(own) == len(found) and all(rank is None or factors.rank <= rank for factors in own.values()):
        return own, type(source.record.method).peft_options
    obstacles = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    plain = {path: _low_rank_factors(source, path, rank, obstacles) for path in source.layers}
    return {path: replace(factors, groups=_groups(source, path)) for path, factors in plain.items()}, {}


def with_one_rank(found: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates with one rank and one scaling: factors are padded with zeros, other scalings go into B."""
    rank = max(factors.rank for factors in found.values())
    (scaling, _), *_ = Counter(factors.scaling for factors in found.values()).most_common(1)
    return {
        path: replace(
            f,
            A=nn.functional.pad(f.A, (0, 0, 0, rank - f.rank)),
            B=nn.functional.pad(f.B if f.scaling == scaling else f.B * (f.scaling / scaling), (0, rank - f.rank)),
            scaling=scaling,
        )
        for path, f in found.items()
    }


def _groups(source: Source, path: str) -> int:
    return int(getattr(source.layers[path].base_layer, "groups", 1))


def _check_layer(source: Source, path: str, joined: Collection[str]) -> None:
    reason = peft_rules.unlike(path, source.modules, source.layers[path].base)
    if reason and path not in joined:
        raise ExportError(f'{path} cannot travel in peft\'s format: {reason}. Use format="merged" instead.')
    source.check_fixed(path)


def _own_factors(source: Source, path: str) -> Factors | str:
    """What a layer is in the words of its method's options, with the tensors beside the pair; or why it is not that."""
    method, layer, adapter = type(source.record.method), source.layers[path], source.adapter(path)
    if method.peft_type != TYPE or not method.peft_options:
        return f'its export class is "{source.export_class}"'
    options, own = ", ".join(method.peft_options), _pair(adapter)
    if own is None:
        return f"peft's {options} needs a factor pair on every layer, and this one trains without"
    if source.name in layer.shifts:
        return f"peft's {options} has no place for the updates of earlier stages, which are folded into the layer"
    if _groups(source, path) > 1:
        return f"peft's {options} takes the lengths of other rows on a convolution of several groups"
    if layer.base_layer.kind == "experts":
        return f"peft's {options} does not work on stacked experts"
    A, B, scaling = own
    extra = {name: tensor.detach().cpu() for name, tensor in adapter.peft_tensors().items()}
    directed = torch.addmm(layer.clean_weight(source.name).to(A.dtype), B, A, alpha=scaling)
    if MAGNITUDE in extra and not directed.norm(dim=1).all():
        return "a row of its weight is zero, and peft divides by the length of each"
    return Factors(*_at_least_one(*own), _bias(adapter), extra=extra)


def _low_rank_factors(source: Source, path: str, rank: int | None, obstacles: dict[str, str]) -> Factors:
    layer, adapter = source.layers[path], source.adapter(path)
    exact, own = layer.low_rank(source.name), _pair(adapter)
    bias = _bias(adapter)
    if exact is None and rank is None:
        path = path if path in obstacles else min(obstacles)  # options hold for all layers: another one hinders them
        raise ExportError(
            f"{source.method} on {path} has no exact low-rank form: {obstacles[path]}. Give rank=N for a truncated SVD "
            'with the discarded fraction reported, or use format="merged" or "delta".'
        )
    if exact is None or (rank is not None and exact[0].shape[-2] > rank):
        A, B, discarded = _truncate(delta(layer, source.name)[0], rank or 0)
        return Factors(A, B, 1.0, bias, discarded)
    if own and torch.equal(own[0], exact[0]) and torch.equal(own[2] * own[1], exact[1]):
        return Factors(*_at_least_one(*own), bias)  # its own values, bit for bit
    return Factors(*_at_least_one(*exact, 1.0), bias)


def _bias(adapter: Adapter) -> Tensor | None:
    bias = adapter.merged_bias(None)
    return None if bias is None else bias.detach().cpu()


def _pair(adapter: Adapter) -> tuple[Tensor, Tensor, float] | None:
    """The pair that an adapter states, and its scaling."""
    pair = adapter.stated_pair()
    return None if pair is None else (pair.lora_A, pair.lora_B, pair.scaling)


def _at_least_one(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
    """The factors on the CPU; one of zeros where every rank component was removed, since peft knows no rank 0."""
    if A.shape[-2]:
        return A.cpu(), B.cpu(), scaling
    lead = A.shape[:-2]
    return torch.zeros(*lead, 1, A.shape[-1], dtype=A.dtype), torch.zeros(*lead, B.shape[-2], 1, dtype=B.dtype), scaling


def delta(layer: AdaptedLayer, name: str) -> tuple[Tensor, float]:
    """The merged weight less the original one, (d_out, d_in), in float64; and how far rounding may carry it."""
    weight, merged = original(layer), layer.merged_weight(name, torch.float64)
    noise = 8 * torch.finfo(merged.dtype).eps * float(weight.abs().max())
    return (merged - weight).cpu(), noise


def original(layer: AdaptedLayer) -> Tensor:
    """The pretrained weight, (d_out, d_in), in float64."""
    return layer.pretrained_weight(torch.float64)


def _truncate(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best (A (*lead, rank, d_in), B (*lead, d_out, rank)) for `update`, and the fraction of its energy left out."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    root = S[..., :rank].sqrt()
    energy = S.square()
    discarded = float(energy[..., rank:].sum() / energy.sum()) if energy.sum() else 0.0
    return (root[..., None] * Vh[..., :rank, :]).float(), (U[..., :rank] * root[..., None, :]).float(), discarded
