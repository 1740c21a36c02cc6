from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_lightning.testing import TinyMLP, perturb, tiny_decoder, tiny_encoder
from lora_lightning.testing.toy_models import DROPPING_KINDS, LAYERS


@pytest.mark.parametrize("make", [tiny_encoder, tiny_decoder, TinyMLP])
def test_tiny_models_are_small_repeatable_and_leave_random_numbers_alone(make: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = make(), make(), make(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert sum(p.numel() for p in first.parameters()) < 6000
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_perturb_moves_every_parameter_by_its_seed() -> None:
    first, second = TinyMLP(), TinyMLP()
    perturb(first, 1)
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    perturb(second, 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_takes_its_input(kind: str) -> None:
    layer, x = LAYERS[kind][0](), LAYERS[kind][1]()
    assert torch.isfinite(layer(x)).all()
    assert (kind in DROPPING_KINDS) == (kind.split()[0] not in ("Embedding", "Experts"))
