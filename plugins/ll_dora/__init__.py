"""DoRA, and the analysis of how training moves magnitudes and directions of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ll_dora.settings import DoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["DoRA"]


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """DoRA."""
    return [DoRA]


@hookimpl
def lora_lightning_callbacks() -> Iterable[type[Callback]]:
    """The recorder of the weight decomposition analysis."""
    from ll_dora.callback import WeightDecomposition

    return [WeightDecomposition]


@hookimpl
def lora_lightning_commands() -> Mapping[str, str]:
    """The verb that draws what the recorder wrote."""
    return {"analyse": "ll_dora.verb"}
