"""PiSSA: factors that start at the leading singular triplets of the weight."""

from __future__ import annotations

from collections.abc import Iterable

from ll_pissa.start import PiSSA
from lora_lightning import hookimpl
from lora_lightning.start_values import Start

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """PiSSA."""
    return [PiSSA]
