"""A data module and an export format: what a plugin can bring beside a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lora_lightning import hookimpl

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

requires_api = ">=1,<2"


@hookimpl
def lora_lightning_datamodules() -> Iterable[type[LightningDataModule]]:
    """FewShotText."""
    from ll_other_parts.data import FewShotText

    return [FewShotText]


@hookimpl
def lora_lightning_exporters() -> Mapping[str, str]:
    """Merged weights for numpy."""
    return {"npz": "ll_other_parts.npz"}
