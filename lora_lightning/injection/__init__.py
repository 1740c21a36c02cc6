"""Adapters in a model: choosing layers, putting adapters on them, switching, merging, taking them off."""

from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, iter_adapters

__all__ = ["adapters_named", "inject", "iter_adapters"]
