"""LoftQ: factors that start at what quantization has lost."""

from __future__ import annotations

from collections.abc import Iterable

from ll_loftq.start import LoftQ
from lora_lightning import hookimpl
from lora_lightning.start_values import Start

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """LoftQ."""
    return [LoftQ]
