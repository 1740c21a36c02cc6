"""Adapters in one basis: canonical factors, alignment of two adapters, and the barrier between them."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_commands() -> Mapping[str, str]:
    """The verb that draws the loss between two adapters."""
    return {"barrier": "ll_rebasin.verb"}
