"""Models with adapters of peft, for the tests of its format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.exporters.peft import rules as peft_rules

LoRA, RoseLoRA, DoRA = (ll.method(name) for name in ("LoRA", "RoseLoRA", "DoRA"))


PEFT_WARNINGS = [
    # peft 0.21.2 reads a name that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft takes its own one-dimensional lora_B.bias for a sharded factor
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape. .*lora_B.bias:peft.utils.warning.PeftWarning"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
"""Marks for tests in which peft itself runs."""

Build = Callable[[], nn.Module]


def seeded(build: Build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **options,
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def randomise(model: nn.Module) -> None:
    """Values such as training would leave; a start of zero would hide every mistake."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)


def from_peft(build: Build, folder: Path, **options: Any) -> Any:
    """A peft model with values that training would leave, saved to `folder`."""
    model = build()
    torch.manual_seed(4)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
    theirs = peft.get_peft_model(model, config)
    randomise(theirs)
    theirs.eval().save_pretrained(folder)
    return theirs


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / peft_rules.TENSORS)
    change(tensors)
    save_file(tensors, folder / peft_rules.TENSORS, {"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
