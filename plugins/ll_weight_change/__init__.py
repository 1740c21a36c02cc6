"""The analysis of how training changes magnitudes and directions of weights."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_callbacks() -> Mapping[str, str]:
    """The recorder of the weight decomposition analysis."""
    return {"WeightDecomposition": "ll_weight_change.callback:WeightDecomposition"}


@hookimpl
def lora_lightning_commands() -> Mapping[str, str]:
    """The verb that draws what the recorder wrote."""
    return {"analyse": "ll_weight_change.verb"}
