"""The conformance suite for adapter methods, and models small enough for milliseconds. Public API."""

from lora_lightning.testing.contract import MethodContract
from lora_lightning.testing.toy_models import (
    BASE_KINDS,
    DROPPING_KINDS,
    TinyMLP,
    perturb,
    tiny_decoder,
    tiny_encoder,
)

__all__ = ["BASE_KINDS", "DROPPING_KINDS", "MethodContract", "TinyMLP", "perturb", "tiny_decoder", "tiny_encoder"]
