"""(IA)^3: learned scales on activations. An example of a plugin in a package of its own."""

from __future__ import annotations

from collections.abc import Iterable

from ll_ia3.method import IA3
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["IA3"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """IA3."""
    return [IA3]
