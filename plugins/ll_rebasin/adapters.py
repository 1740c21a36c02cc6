"""Canonical form and alignment of adapters in a model, in place: what they compute stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from ll_rebasin.functional import Side, align, canonical
from lora_lightning.adapters.base import Adapter, FactorPair
from lora_lightning.distributed import is_sharded
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.records import adapters_named, check_known, injected_root


def canonicalize(model: nn.Module, name: str = "default") -> None:
    """Write each factor pair of an adapter in its canonical form.

    For adapters that have been trained: what an optimizer knows of the factors no longer fits them.

    Args:
        model: has the adapter.
        name: of the adapter.

    Raises:
        AdapterStateError: no such adapter, or a sharded model.
        SettingsError: an adapter without factor pairs whose product alone counts, with removed entries or components,
            or with a side that is frozen.
    """
    for pair in (pair for pairs in _written(model, name).values() for pair in pairs):
        _write(pair, *canonical(pair.lora_A, pair.lora_B))


def align_adapter(model: nn.Module, name: str, reference: str, side: Side = "A") -> None:
    """Write the factors of an adapter in the inner basis in which they are closest to those of another one.

    Layers that the reference does not adapt stay as they are. Bring both into canonical form first: an orthogonal
    basis is what is left then.

    Args:
        model: has both adapters.
        name: of the adapter that is written.
        reference: of the adapter that stays.
        side: "A" brings A close, "both" A and B together.

    Raises:
        AdapterStateError: no such adapter, or a sharded model.
        SettingsError: as `canonicalize`, or pairs of other ranks.
    """
    theirs = _pairs(model, reference)
    for path, pairs in _written(model, name).items():
        for pair, other in zip(pairs, theirs.get(path, ()), strict=path in theirs):
            # each factor with its part of the scaling, so that pairs of other scalings are comparable
            mine, ratio = abs(pair.scaling) ** 0.5, abs(other.scaling) ** 0.5
            A, B = align(mine * pair.lora_A, mine * pair.lora_B, (ratio * other.lora_A, ratio * other.lora_B), side)
            _write(pair, A / mine, B / mine)


def _pairs(model: nn.Module, name: str) -> dict[str, tuple[FactorPair, ...]]:
    """The factor pairs of an adapter, by layer."""
    root = injected_root(model)
    check_known(root, [name])
    if is_sharded(model):
        raise AdapterStateError("the model is sharded; save the adapter, and load it into a model that is not.")
    found = {}
    for path, adapter in adapters_named(root, name).items():
        _check_free(adapter, path)
        found[path] = adapter.factor_pairs()
    return found


def _written(model: nn.Module, name: str) -> dict[str, tuple[FactorPair, ...]]:
    """The same, of which both sides can be written; all are checked before the first is."""
    found = _pairs(model, name)
    for path, pairs in found.items():
        for pair in pairs:
            _check_trained(pair, path)
    return found


def _check_free(adapter: Adapter, path: str) -> None:
    why = ""
    if not adapter.factor_pairs():
        why = "has no factors of which the product alone counts"
    elif adapter.rank_mask is not None and not bool(adapter.rank_mask.all()):
        why = "has removed rank components"
    elif any(not bool(mask.mask.all()) for mask in adapter.masks()):
        why = "has removed entries, which another basis would fill"
    if why:
        raise SettingsError(
            f"{path}: {type(adapter).__name__} {why}, so its basis is not free; lora_lightning.compose writes the same "
            "update as a plain pair of factors, where it is low rank."
        )


def _check_trained(pair: FactorPair, path: str) -> None:
    if not (isinstance(pair.lora_A, nn.Parameter) and isinstance(pair.lora_B, nn.Parameter)):
        raise SettingsError(f"{path}: one of the factors is fixed by the method, so the basis is not free.")


@torch.no_grad()
def _write(pair: FactorPair, A: torch.Tensor, B: torch.Tensor) -> None:
    pair.lora_A.copy_(A)
    pair.lora_B.copy_(B)
