"""What a pair optimizer refuses, counts and is told."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject
from lora_lightning.adapters.base import FactorPair
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.directions import adam, descend
from lora_lightning.optim.groups import build_optimizer, factor_pairs
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings, one_of
from lora_lightning.optim.pairs import factorise, stack_pairs


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


def model(**settings):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject(net, LoRA(rank=2, **settings), ["0"], also_train=["1"])
    return net


def test_a_step_without_pairs_names_the_fix():
    net = model()
    optimizer = Recorder([p for p in net.parameters() if p.requires_grad])
    with pytest.raises(
        TrainingError, match=r"Recorder does not know the factor pairs; call optimizer.bind_pairs\(lora"
    ):
        optimizer.step()
    optimizer.bind_pairs(factor_pairs(net))
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()


def test_no_pairs_at_all():
    with pytest.raises(TrainingError, match="Recorder needs factor pairs, and nothing that trains is one"):
        Recorder(nn.Linear(2, 2).parameters()).bind_pairs(())
    with pytest.raises(TrainingError, match="nothing that trains is one"):
        Recorder(nn.Linear(2, 2).parameters()).bind_pairs(factor_pairs(model()))


def test_pairs_that_cannot_be_stepped():
    one = pair(2, 4, 4)
    shared = FactorPair("q", one.lora_A, pair(2, 4, 4, seed=1).lora_B, 1.0)
    with pytest.raises(TrainingError, match='the factor pair "q" shares a factor with another pair'):
        Recorder([one.lora_A, one.lora_B]).bind_pairs((one, shared))
    half = pair(2, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match='the factor pair "p" is in half precision'):
        Recorder([half.lora_A, half.lora_B]).bind_pairs((half,))


@pytest.mark.parametrize(
    ("trains", "train", "message"),
    [
        ("both", "B", "trains B alone; it needs both sides"),
        ("both", "A", "trains A alone; it needs both sides"),
        ("B", "both", "trains A; .* so set the method's option train: B"),
        ("B", "A", "trains A; .*option train: B"),
    ],
)
def test_sides_that_must_train(trains, train, message, monkeypatch):
    monkeypatch.setattr(Recorder, "trains", trains)
    with pytest.raises(TrainingError, match=message):
        build_optimizer(model(train=train), Recorder)
    build_optimizer(model(train=trains), Recorder)


def test_a_damped_pair_is_counted_under_its_parameter_and_warned_of_once():
    one = pair(2, 4, 4)
    optimizer = Recorder([one.lora_A, one.lora_B])
    optimizer.bind_pairs((one,))
    (stack,) = stack_pairs((one,))
    (singular,) = factorise([torch.zeros(1, 2, 2, dtype=torch.float64)], 0.0)
    assert optimizer.report() == {}
    with pytest.warns(UserWarning, match='Recorder: factors of the pair "p" are so near singular'):
        optimizer.count_damped(stack, singular, "A")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.count_damped(stack, singular, "A")
    assert optimizer.report() == {"p": 2}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = Recorder([one.lora_A, one.lora_B])
    again.load_state_dict(torch.load(file, weights_only=True))
    again.bind_pairs((one,))
    assert again.report() == {"p": 2}


def test_the_closure_runs_once_with_gradients_on():
    net = model()
    optimizer = build_optimizer(net, Recorder)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss.detach()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "Recorder.lr is -1; it must be at least 0"),
        ({"damping": -1e-3}, "Recorder.damping is -0.001; it must be at least 0"),
        ({"lr": float("nan")}, "Recorder.lr is nan"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        Recorder(model().parameters(), **settings)
    with pytest.raises(SettingsError, match=f"^{message}"):
        build_optimizer(model(), lambda groups: Recorder(groups, **settings))


def test_a_choice():
    optimizer = Recorder(model().parameters())
    with pytest.raises(SettingsError, match=r"Recorder.order is 'x'; it takes y, z\."):
        check_settings(optimizer, {"order": one_of("y", "z")})
