"""Element-wise steps over directions against torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning.adapters.base import FactorPair
from lora_lightning.optim.directions import adam, descend
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings
from lora_lightning.optim.pairs import stack_pairs


def pair(r, d_in, d_out, lead=(), seed=0, dtype=torch.float32, name="p"):
    g = torch.Generator().manual_seed(seed)
    A = nn.Parameter(torch.randn(*lead, r, d_in, generator=g, dtype=torch.float64).to(dtype))
    B = nn.Parameter(torch.randn(*lead, d_out, r, generator=g, dtype=torch.float64).to(dtype))
    return FactorPair(name, A, B, 2.0)


class Recorder(PairOptimizer):
    """Adam on raw gradients, pairs or not."""

    def __init__(self, params, lr=0.1, **settings):
        super().__init__(
            params, {"lr": lr, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {"order": "x", **settings}
        )
        check_settings(self)

    def take_step(self):
        found = {
            f: f.grad for stack in stack_pairs(self.with_gradient("A", "B")) for s in "AB" for f in stack.factors(s)
        }
        descend(self, adam(self, {**found, **self.plain_gradients()}))


def test_the_form_of_transformers_equals_its_formula_by_hand():
    """peft's LoRA-FA and transformers' AdamW: eps before the correction, decay after the step."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    expected, m, v = p.detach().clone(), torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    optimizer = Recorder([p])  # betas (0.8, 0.95), eps 1e-3, rate and decay 0.1
    for t in range(1, 4):
        g = torch.tensor([0.3, -0.01, 2.0], dtype=torch.float64) * t
        with torch.no_grad():
            descend(optimizer, adam(optimizer, {p: g}, form="transformers"), "transformers")
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        expected -= 0.1 * (1 - 0.95**t) ** 0.5 / (1 - 0.8**t) * m / (v.sqrt() + 1e-3)
        expected *= 1 - 0.1 * 0.1
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_adam_and_descent_equal_torch_adamw():
    torch.manual_seed(0)
    shapes = [(3, 2), (4,)]
    ours, theirs = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    optimizer = Recorder([{"params": ours[:1]}, {"params": ours[1:], "betas": (0.5, 0.9)}])
    reference = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "betas": (0.5, 0.9)}],
        lr=0.1,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.1,
    )
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape)
        if step == 2:
            ours[1].grad = theirs[1].grad = None
        with torch.no_grad():
            optimizer.take_step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_adam_without_bias_correction():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Recorder([p])
    found = adam(optimizer, {p: torch.tensor([2.0], dtype=torch.float64)}, bias_correction=False)
    assert float(found[p]) == pytest.approx(0.2 * 2 / ((0.05 * 4) ** 0.5 + 1e-3))
