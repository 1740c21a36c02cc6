"""A data module and an export format: what a plugin can bring beside a method."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_datamodules() -> Mapping[str, str]:
    """FewShotText."""
    return {"FewShotText": "ll_other_parts.data:FewShotText"}


@hookimpl
def lora_lightning_exporters() -> Mapping[str, str]:
    """Merged weights for numpy."""
    return {"npz": "ll_other_parts.npz"}
