"""BeamLoRA: weak rank components are overwritten by copies of strong ones."""

from __future__ import annotations

from collections.abc import Iterable

from ll_beamlora.method import BeamLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["BeamLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """BeamLoRA."""
    return [BeamLoRA]
