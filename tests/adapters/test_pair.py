"""The pair of factors that most methods hold: names, start, sides, and what it answers."""

from __future__ import annotations

import math

import pytest
import torch
from one_layer import base_of, linear
from torch import Tensor, nn

from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.errors import SettingsError


class Gated(PairAdapter):
    """W' = W + g s B A with a number g; with rank 0 the weight itself."""

    def __init__(self, base: BaseLayer, rank: int = 3, **options: object) -> None:
        super().__init__()
        self.gate = nn.Parameter(base.zeros(1))
        self.hold_pair(base, rank=rank, scaling=0.5, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, self.lora_A, self.gate * self.lora_B, self.scaling)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return plus_product(weight, self.gate * self.lora_B, self.lora_A, self.scaling) if self.rank else weight

    def reset_others(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.gate.copy_(torch.rand(1, generator=generator))


def test_factors_have_their_names_and_shapes_in_the_order_of_making() -> None:
    adapter = Gated(linear(12, 10))
    shapes = {name: tuple(value.shape) for name, value in adapter.named_parameters()}
    assert list(shapes.items()) == [("gate", (1,)), ("lora_A", (3, 12)), ("lora_B", (10, 3))]
    leading = Gated(linear(12, 10), lead=(4,))
    assert (leading.lora_A.shape, leading.lora_B.shape) == ((4, 3, 12), (4, 10, 3))
    experts = Gated(base_of("Experts")[0], rank=2)
    assert (experts.lora_A.shape, experts.lora_B.shape) == ((3, 2, 6), (3, 5, 2))


def test_the_pair_starts_before_the_rest_and_at_zero() -> None:
    adapter = Gated(linear(12, 10))
    adapter.reset(torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(0)
    expected = (2 * torch.rand(3, 12, generator=drawn) - 1) / math.sqrt(12)
    assert torch.equal(adapter.lora_A, expected.double())
    assert not adapter.lora_B.any()
    assert torch.equal(adapter.gate, torch.rand(1, generator=drawn).double())


@pytest.mark.parametrize(("train", "parameters"), [("both", {"A", "B"}), ("A", {"A"}), ("B", {"B"})])
def test_one_side_may_be_a_buffer_and_the_trained_one_starts_at_zero(train: str, parameters: set[str]) -> None:
    adapter = Gated(linear(), train=train)
    adapter.reset(torch.Generator().manual_seed(0))
    assert {name[-1] for name, _ in adapter.named_parameters()} == parameters | {"e"}
    assert set(adapter.state_dict()) == {"gate", "lora_A", "lora_B"}
    zero, random = (adapter.lora_A, adapter.lora_B) if train == "A" else (adapter.lora_B, adapter.lora_A)
    assert bool(random.any())
    assert not zero.any()


def test_of_an_embedding_the_small_side_is_random() -> None:
    adapter = Gated(base_of("Embedding")[0])
    adapter.reset(torch.Generator().manual_seed(0))
    assert not adapter.lora_A.any()
    assert bool(adapter.lora_B.any())


def test_it_lists_its_pair_and_its_scaled_factors() -> None:
    adapter = Gated(linear())
    adapter.reset(torch.Generator().manual_seed(0))
    nn.init.normal_(adapter.lora_B)
    (pair,) = adapter.factor_pairs()
    assert pair.lora_A is adapter.lora_A
    assert pair.lora_B is adapter.lora_B
    assert pair.scaling == 0.5
    A, B = adapter.scaled_factors()
    torch.testing.assert_close(B @ A, 0.5 * (adapter.lora_B @ adapter.lora_A).detach())
    assert not A.requires_grad
    assert not B.requires_grad
    adapter.register_buffer("rank_mask", torch.tensor([True, False, True]))
    A, B = adapter.scaled_factors()
    assert (A.shape, B.shape) == ((2, 12), (10, 2))
    assert repr(adapter) == "Gated(rank=3, scaling=0.5)"


def test_without_factors_there_is_no_pair() -> None:
    adapter = Gated(linear(), rank=0)
    adapter.reset(torch.Generator().manual_seed(0))
    assert set(adapter.state_dict()) == {"gate"}
    assert adapter.factor_pairs() == ()
    assert adapter.lora_A is None


def test_settings_a_layer_cannot_have() -> None:
    with pytest.raises(SettingsError, match=r"dropout is 0.1; an embedding has token ids"):
        Gated(base_of("Embedding")[0], dropout=0.1)
