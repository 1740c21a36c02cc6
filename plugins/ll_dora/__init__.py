"""DoRA, and the analysis of how training moves magnitudes and directions of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ll_dora.settings import DoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["DoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """DoRA."""
    return [DoRA]


@hookimpl
def lora_lightning_callbacks() -> Mapping[str, str]:
    """The recorder of the weight decomposition analysis."""
    return {"WeightDecomposition": "ll_dora.callback:WeightDecomposition"}


@hookimpl
def lora_lightning_commands() -> Mapping[str, str]:
    """The verb that draws what the recorder wrote."""
    return {"analyse": "ll_dora.verb"}
