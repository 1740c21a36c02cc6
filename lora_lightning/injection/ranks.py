"""Ranks above a layer's narrow side: a new adapter takes the side's width there, which can express as much.

An update of a layer of d_in inputs and d_out outputs has at most rank min(d_in, d_out). What is read from a file keeps
the rank it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.methods import LowRankFields, Method, WrapperMethod, replace


def fit_ranks(settings: Mapping[str, Method], layers: Mapping[str, BaseLayer]) -> tuple[dict[str, Method], list[str]]:
    """Each layer's method with ranks that its layer can have, and a note for each width that ranks were cut to.

    Of a method with `LowRankFields` the scaling stays, so alpha shrinks with the rank.

    Args:
        settings: method by layer path.
        layers: base layer by path; more than in `settings` do no harm.
    """
    fitted, cut = {}, dict[tuple[str, int, int], list[str]]()
    for path, method in settings.items():
        narrow = min(layers[path].d_in, layers[path].d_out)
        fitted[path] = _fit(method, narrow)
        for name, rank in _ranks(method).items():
            if rank > narrow:
                cut.setdefault((name, rank, narrow), []).append(path)
    notes = [
        f"{name} {rank} is taken as {narrow} on {len(paths)} layer{'s' * (len(paths) > 1)} no wider than that, such as "
        f"{paths[0]}; the scaling stays as it is."
        for (name, rank, narrow), paths in cut.items()
    ]
    return fitted, notes


def _ranks(method: Method) -> dict[str, int]:
    """Fields that are ranks, with their values, of the method and of the one inside it."""
    own = {name: getattr(method, name) for name in method.ranks if hasattr(method, name)}
    return own | _ranks(method.inner) if isinstance(method, WrapperMethod) else own


def _fit(method: Method, narrow: int) -> Method:
    fields: dict[str, Any] = {name: narrow for name in method.ranks if getattr(method, name, 0) > narrow}
    if isinstance(method, WrapperMethod):
        fields["inner"] = _fit(method.inner, narrow)
    fitted = replace(method, "rank", fields)
    if isinstance(method, LowRankFields) and isinstance(fitted, LowRankFields) and "rank" in fields:
        return replace(fitted, "alpha", {"alpha": fitted.alpha * method.scaling / fitted.scaling})
    return fitted
