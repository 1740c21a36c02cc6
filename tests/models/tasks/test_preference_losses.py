"""Each loss against its equation, number by number in Python's own float64."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from lora_lightning.models.tasks.preference_losses import dpo, ipo, kto, log_odds, odds_ratio, simpo

CHOSEN, REJECTED = [-1.5, 0.25, -0.04, 3.0], [-0.3, -2.0, -0.7, 3.0]


def s(x):
    return 1 / (1 + exp(-x))


def odds(p):
    return p / (1 - p)


EQUATIONS = {
    "dpo": (
        lambda c, r: dpo(c, r, 0.3, 0.0),
        lambda c, r: -log(s(0.3 * c - 0.3 * r)),
    ),
    "dpo with doubtful labels": (
        lambda c, r: dpo(c, r, 0.3, 0.2),
        lambda c, r: -0.8 * log(s(0.3 * (c - r))) - 0.2 * log(1 - s(0.3 * (c - r))),
    ),
    "ipo": (lambda c, r: ipo(c, r, 0.4), lambda c, r: (c - r - 1 / (2 * 0.4)) ** 2),
    "simpo": (
        lambda c, r: simpo(c, r, 2.0, 0.5, 0.1),
        lambda c, r: -0.9 * log(s(2 * c - 2 * r - 0.5)) - 0.1 * log(s(0.5 + 2 * r - 2 * c)),
    ),
    "orpo": (
        lambda c, r: odds_ratio(c - 4, r - 4, 0.3),
        lambda c, r: -0.3 * log(s(log(odds(exp(c - 4)) / odds(exp(r - 4))))),
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_losses_of_pairs(name):
    ours, equation = EQUATIONS[name]
    found = ours(torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(REJECTED, dtype=torch.float64))
    assert found.tolist() == pytest.approx([equation(c, r) for c, r in zip(CHOSEN, REJECTED, strict=True)], rel=1e-10)


def test_the_loss_of_labels():
    kl, beta, good, bad = 0.7, 0.3, 1.5, 0.5
    desirable = [True, False, True, False]
    found = kto(torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(desirable), torch.tensor(kl), beta, (good, bad))
    expected = [
        good * (1 - s(beta * (r - kl))) if wanted else bad * (1 - s(beta * (kl - r)))
        for r, wanted in zip(CHOSEN, desirable, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_from_near_certainty_to_near_impossibility(dtype):
    values = [-80.0, -20.0, -1.0, -0.6931, -0.1, -1e-3]
    found = log_odds(torch.tensor(values, dtype=dtype))
    assert found.tolist() == pytest.approx([x - log(-(exp(x) - 1)) for x in values], rel=1e-5, abs=1e-6)
    certain = torch.zeros(1, dtype=dtype, requires_grad=True)
    value = log_odds(certain)
    value.backward()
    assert value.isfinite()
    assert certain.grad.isfinite()
