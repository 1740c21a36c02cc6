"""OLoRA: factors that start at a QR decomposition of the weight."""

from __future__ import annotations

from collections.abc import Iterable

from ll_olora.start import OLoRA
from lora_lightning import hookimpl
from lora_lightning.start_values import Start

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """OLoRA."""
    return [OLoRA]
