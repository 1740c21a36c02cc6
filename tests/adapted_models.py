"""Models with adapters, for the tests of `injection` and `models`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import TinyMLP, perturb
from lora_lightning.testing.toy_models import seeded

METHOD = LoRA(rank=2, alpha=4.0)


X = torch.linspace(-1, 1, 18).view(3, 6)


def adapted(name: str = "default", model: Any = None, moved: bool = True, **options: Any) -> Any:
    """A TinyMLP with one more adapter, whose update is not zero."""
    model = TinyMLP() if model is None else model
    ll.inject(model, METHOD, name=name, seed=0, **options)
    if moved:
        for i, adapter in enumerate(adapters_named(model, name).values()):
            perturb(adapter, len(name) + i)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def tiny_moe() -> Any:
    """A block with a plain MLP, and one whose four experts lie in two 3-D tensors, with a router."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        mlp_only_layers=[0],
    )
    with seeded(0):
        return Qwen3MoeForCausalLM(config).eval()
