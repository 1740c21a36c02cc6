"""Models small enough for milliseconds: random weights, no files. Reached as names of `lora_lightning.testing`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.kinds import ExpertStack


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random numbers from `seed` inside the block, as they were after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class TinyMLP(nn.Module):
    """Two linear layers, `first` (6 -> 8) and `second` (8 -> 4), with a tanh between; plain torch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 6) to (..., 4)."""
        return cast(Tensor, self.second(torch.tanh(self.first(x))))


def tiny_encoder(num_labels: int = 3, seed: int = 0) -> Any:
    """A random BERT classifier of two blocks and about 5,000 weights: vocabulary 32, width 16, 16 positions."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        type_vocab_size=1,
        num_labels=num_labels,
    )
    with seeded(seed):
        return BertForSequenceClassification(config).eval()


def tiny_decoder(tied: bool = False, seed: int = 0) -> Any:
    """A random Llama language model of two blocks and about 5,000 weights: vocabulary 32, width 16.

    Args:
        tied: whether the output layer shares the embedding's weight.
        seed: seed of its weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with seeded(seed):
        return LlamaForCausalLM(config).eval()


def perturb(adapter: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Add normal numbers times `size` to every parameter, so that an update that starts at zero is none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype).to(parameter.device))


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return cast(nn.Module, Conv1D(5, 6))


def _expert_stack(rows: int, columns: int, transposed: bool) -> nn.Module:
    return ExpertStack(nn.Parameter(torch.randn(3, rows, columns) / 3), transposed)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(2, 3, 6)),
    "Conv1D": (_conv1d_of_transformers, lambda: torch.randn(2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=1), lambda: torch.randn(2, 3, 5, 6)),
    "Conv2d grouped": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
        lambda: torch.randn(2, 4, 5, 6),
    ),
    "Experts": (lambda: _expert_stack(5, 6, transposed=False), lambda: torch.randn(3, 4, 6)),
    "Experts transposed": (lambda: _expert_stack(6, 5, transposed=True), lambda: torch.randn(3, 4, 6)),
    "Embedding": (lambda: nn.Embedding(11, 5, padding_idx=0), lambda: torch.randint(11, (2, 4))),
}
"""A base layer and an input for it, by the kind's name."""
BASE_KINDS: tuple[str, ...] = tuple(LAYERS)
"""Names of the base layers that the contract tries; "Conv1D" is the one of transformers."""
DROPPING_KINDS: tuple[str, ...] = tuple(kind for kind in LAYERS if kind.split()[0] not in ("Embedding", "Experts"))
"""Those whose input an adapter can drop entries of, and that can have a bias."""


def _four_bits(layer: nn.Linear, double: bool) -> nn.Module:
    nn4 = importlib.import_module("bitsandbytes.nn")
    module = nn4.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compress_statistics=double, quant_type="nf4"
    )
    module.load_state_dict(layer.state_dict())
    module.weight = nn4.Params4bit(layer.weight.data, compress_statistics=double, quant_type="nf4", module=module)
    return cast(nn.Module, module.to("cpu").requires_grad_(False))


def _eight_bits(layer: nn.Linear) -> nn.Module:
    make = importlib.import_module("bitsandbytes.nn").Linear8bitLt
    # transformers' threshold, above which a column of inputs is not rounded
    module = make(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0)
    module.load_state_dict(layer.state_dict())
    return cast(nn.Module, module.to("cpu").requires_grad_(False))


def _torchao(layer: nn.Linear, bits: int) -> nn.Module:
    ao = importlib.import_module("torchao.quantization")
    if bits == 8:
        config = ao.Int8WeightOnlyConfig()
    else:  # in whole bytes: torchao's own four-bit layout has kernels for CUDA only
        groups = importlib.import_module("torchao.quantization.granularity").PerGroup(8)
        config = ao.IntxWeightOnlyConfig(cast(Any, torch).int4, groups)
    model = nn.Sequential(layer.requires_grad_(False))
    ao.quantize_(model, config)
    return model[0]


QUANTIZED: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "nf4": ("bitsandbytes", lambda layer: _four_bits(layer, double=False)),
    "nf4-double": ("bitsandbytes", lambda layer: _four_bits(layer, double=True)),
    "int8": ("bitsandbytes", _eight_bits),
    "torchao-int8": ("torchao", lambda layer: _torchao(layer, 8)),
    "torchao-int4": ("torchao", lambda layer: _torchao(layer, 4)),
}
"""The package that has a format, and a function that quantizes a linear layer, by the format's name."""
