from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning.errors import SettingsError
from lora_lightning.optim.clipping import clip_gradients, clip_groups


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    """Two of them, with gradients of norm 5 and 10."""
    own, shared = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    own.grad, shared.grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    return own, shared


def optimizer(own, shared):
    return torch.optim.SGD([{"params": [own], "clip": 1.0}, {"params": [shared]}], lr=0.1)


def test_a_group_with_a_norm_of_its_own_and_the_rest_by_the_trainers():
    own, shared = parameters()
    clip_gradients(optimizer(own, shared), 2.0, None)
    assert float(own.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    assert float(shared.grad.norm()) == pytest.approx(2.0, rel=1e-5)


def test_by_value_and_not_at_all():
    own, shared = parameters()
    clip_gradients(optimizer(own, shared), 7.0, "value")
    assert shared.grad.tolist() == [6.0, 7.0]
    own, shared = parameters()
    assert clip_groups(optimizer(own, shared)) == [shared]
    clip_gradients(optimizer(own, shared), None, None)
    assert shared.grad.tolist() == [6.0, 8.0]


def test_an_optimizer_that_clips_itself():
    made = optimizer(*parameters())
    made.clips_itself = True
    with pytest.raises(SettingsError, match=r"gradient_clip_val is 1\.0; SGD clips where its rule allows it"):
        clip_gradients(made, 1.0, None)
    clip_gradients(made, None, None)
