"""Core's export formats: the module that writes each, by name. `plugins.Registry.formats` has those of plugins too."""

from __future__ import annotations

FORMATS = {
    "delta": "lora_lightning.exporters.delta",
    "merged": "lora_lightning.exporters.merged",
    "peft": "lora_lightning.exporters.peft_export",
}
