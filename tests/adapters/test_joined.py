"""A pair to which those of other layers are joined."""

from __future__ import annotations

import torch
from torch import nn

from lora_lightning.adapters.joined import JoinedPair, narrowest
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.testing import perturb


def pair(rank, scaling, seed, d_in=6, d_out=5):
    layer = core_base_layer(nn.Linear(d_in, d_out, dtype=torch.float64))
    adapter = JoinedPair(layer, rank=rank, scaling=scaling, dropout=0.0, joins=True)
    perturb(adapter, seed)
    return adapter, layer


def test_pairs_of_other_ranks_and_scalings_are_one_product():
    (own, layer), (other, _), (third, _) = pair(2, 1.5, 0), pair(1, 0.5, 1), pair(1, 1.5, 2)
    alone = own.low_rank()
    assert torch.equal(alone[1] @ alone[0], 1.5 * own.lora_B.detach() @ own.lora_A.detach())
    own.peers = (other, third)
    delta = sum(p.scaling * p.lora_B @ p.lora_A for p in (own, other, third))
    A, B = own.low_rank()
    assert A.shape == (4, 6)
    torch.testing.assert_close(B @ A, delta.detach(), rtol=0, atol=1e-12)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(own(x, layer), layer(x) + x @ delta.T, rtol=0, atol=1e-12)
    assert not [name for name, _ in own.named_parameters() if "peer" in name]


def test_a_product_wider_than_the_layer_goes_through_its_narrower_side():
    generator = torch.Generator().manual_seed(0)
    for d_in, d_out in ((6, 4), (4, 6)):
        A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((9, d_in), (d_out, 9)))
        narrow_A, narrow_B = narrowest(A, B)
        assert narrow_A.shape == (4, d_in)
        torch.testing.assert_close(narrow_B @ narrow_A, B @ A, rtol=0, atol=1e-12)
