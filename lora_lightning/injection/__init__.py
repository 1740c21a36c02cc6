"""Adapters in a model: choosing layers, putting adapters on them, switching, merging, taking them off."""

from lora_lightning.injection.inject import inject

__all__ = ["inject"]
