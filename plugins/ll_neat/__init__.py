"""NEAT: a small network of the frozen weight as its update; peft calls it PEANuT."""

from __future__ import annotations

from collections.abc import Iterable

from ll_neat.method import NEAT
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["NEAT"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """NEAT."""
    return [NEAT]
