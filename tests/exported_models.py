"""Small Hugging Face models with adapters, and methods without a low-rank form, for the tests of `exporters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.methods import Method

LoRA = ll.method("LoRA")


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **SMALL, **options)).eval()


def bert(num_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, num_labels=num_labels, **SMALL)
    return transformers.BertForSequenceClassification(config).eval()


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def adapted(model: nn.Module | None = None, method: Method | None = None, **options: Any) -> nn.Module:
    model = llama() if model is None else model
    ll.inject(model, method or LoRA(rank=4, alpha=8), **options)
    return randomise(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 17).view(2, 7)).logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


class Scaled(Adapter):
    """W' = g * W: full rank, not additive."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(base.d_out))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base.apply(x, self.merged_weight(base.weight()), base.bias)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * self.gain[:, None].to(weight.dtype)

    def reset(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.gain)


@dataclass(frozen=True, kw_only=True)
class Gain(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Scaled(base)


class Folded(Scaled):
    """A low-rank update that states no factor pair: one outer product."""

    additive = True

    def merged_weight(self, weight: Tensor) -> Tensor:
        A, B = (factor.to(weight.dtype) for factor in self.low_rank())
        return weight + B @ A

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 16), self.gain.detach()[:, None]
