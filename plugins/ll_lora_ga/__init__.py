"""LoRA-GA: factors that start at singular vectors of the full gradient."""

from __future__ import annotations

from collections.abc import Iterable

from ll_lora_ga.start import LoRAGA
from lora_lightning import hookimpl
from lora_lightning.start_values import Start

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """LoRAGA."""
    return [LoRAGA]
