"""CorDA: factors that start at directions that matter, or do not, in a context."""

from __future__ import annotations

from collections.abc import Iterable

from ll_corda.start import CorDA
from lora_lightning import hookimpl
from lora_lightning.start_values import Start

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """CorDA."""
    return [CorDA]
