"""Analyses of how training changes weights: magnitudes and directions, and ranks of updates."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_callbacks() -> Mapping[str, str]:
    """The recorders."""
    return {
        "UpdateSpectrum": "ll_weight_change.spectrum:UpdateSpectrum",
        "WeightDecomposition": "ll_weight_change.callback:WeightDecomposition",
    }


@hookimpl
def lora_lightning_commands() -> Mapping[str, str]:
    """The verb that draws what the recorders wrote."""
    return {"analyse": "ll_weight_change.verb"}
