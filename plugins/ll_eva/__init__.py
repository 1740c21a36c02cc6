"""EVA: first factors that start at the directions of the inputs, and ranks by how much these explain."""

from __future__ import annotations

from collections.abc import Iterable

from ll_eva.start import EVA
from lora_lightning import hookimpl
from lora_lightning.start_values import Start

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """EVA."""
    return [EVA]
