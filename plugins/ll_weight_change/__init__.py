"""The analysis of how training changes magnitudes and directions of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lora_lightning import hookimpl

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


@hookimpl
def lora_lightning_callbacks() -> Iterable[type[Callback]]:
    """The recorder of the weight decomposition analysis."""
    from ll_weight_change.callback import WeightDecomposition

    return [WeightDecomposition]


@hookimpl
def lora_lightning_commands() -> Mapping[str, str]:
    """The verb that draws what the recorder wrote."""
    return {"analyse": "ll_weight_change.verb"}
