"""FFA-LoRA: the contract, the frozen A, and what its settings bring about."""

from __future__ import annotations

import pytest
import torch
from resuming import run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

from ll_ffa_lora import FFALoRA
from ll_lora import LoRA
from lora_lightning.callbacks import FederatedRounds, PrivateGradients
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import MethodContract


@pytest.mark.slow  # its layers are those of plain pairs
class TestFFALoRA(MethodContract):
    method = FFALoRA(rank=2, alpha=4.0)
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestOrthonormalFFALoRA(MethodContract):
    method = FFALoRA(rank=2, alpha=4.0, directions="orthonormal")


def layer(method, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    inject(model, method, seed=seed)
    return model, adapters_named(model, "default")["0"]


def train(model, lr, steps=10):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_A_is_a_buffer_that_stays_and_is_the_same_on_another_client():
    (model, adapter), (_, other) = layer(FFALoRA(rank=2)), layer(FFALoRA(rank=2))
    before = adapter.lora_A.clone()
    train(model, 0.1)
    assert [name for name, _ in adapter.named_parameters()] == ["lora_B"]  # what is sent
    assert torch.equal(adapter.lora_A, before)
    assert torch.equal(other.lora_A, before)
    assert adapter.lora_B.any()
    assert not torch.equal(layer(FFALoRA(rank=2), seed=1)[1].lora_A, before)


def test_alpha_and_rate_trade_with_sgd():
    updates = []
    for alpha, lr in ((2.0, 0.1), (6.0, 0.1 / 9)):
        model, adapter = layer(FFALoRA(rank=2, alpha=alpha))
        train(model, lr)
        A, B = adapter.low_rank()
        updates.append(B @ A)
    torch.testing.assert_close(updates[0], updates[1], atol=1e-12, rtol=0)
    assert updates[0].abs().max() > 1e-2


def test_it_is_lora_with_a_frozen_A_bit_for_bit():
    (own, _), (plain, _) = layer(FFALoRA(rank=2, alpha=4.0)), layer(LoRA(rank=2, alpha=4.0, train="B"))
    for model in (own, plain):
        train(model, 0.1)
    for name in ("lora_A", "lora_B"):
        key = f"0.adapters.default.{name}"
        assert torch.equal(own.state_dict()[key], plain.state_dict()[key])


def test_orthonormal_rows():
    _, adapter = layer(FFALoRA(rank=3, directions="orthonormal"))
    torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, torch.eye(3, dtype=torch.float64), atol=1e-7, rtol=0)
    drawn = layer(FFALoRA(rank=3))[1].lora_A
    span = torch.linalg.lstsq(drawn.T, adapter.lora_A.T).solution
    torch.testing.assert_close(drawn.T @ span, adapter.lora_A.T, atol=1e-7, rtol=0)  # of the rows that were drawn


def test_settings_bring_the_callbacks():
    assert FFALoRA().callbacks() == []
    rounds, private = FFALoRA(clients=3, local_steps=4, skew=0.5, clip=2.0, epsilon=6.0).callbacks()
    assert isinstance(rounds, FederatedRounds)
    assert (rounds.clients, rounds.local_steps, rounds.skew) == (3, 4, 0.5)
    assert isinstance(private, PrivateGradients)
    assert (private.clip, private.epsilon, private.noise_multiplier) == (2.0, 6.0, None)


def test_the_report_says_what_is_sent():
    model, _ = layer(method := FFALoRA(rank=2))
    facts = method.report(adapters_named(model, "default"))
    assert facts == {"numbers_a_round": 2 * 5, "with_both_factors": 2 * (5 + 6)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients": 0}, r"FFALoRA.clients is 0; it must be a whole number of at least 1, or null"),
        ({"epsilon": 3.0}, r"FFALoRA.clip is None; noise needs a largest gradient"),
        ({"skew": 0.5}, r"FFALoRA.skew is 0.5; clients is None, so there is nothing to differ"),
        ({"directions": "orthogonal"}, r'FFALoRA.directions is "orthogonal". Did you mean "orthonormal"'),
        ({"rank": 0}, r"FFALoRA.rank is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        FFALoRA(**settings)


@pytest.mark.slow
def test_a_run_averages_heads_too_and_leaves_A(tmp_path):
    folder = encoder_folder(tmp_path / "model")
    own = classification(folder, FFALoRA(rank=2, clients=3, local_steps=2))
    state = run(own, labelled_data(folder), tmp_path, max_steps=12)["state"]
    rounds = next(c for c in own.trainer.callbacks if isinstance(c, FederatedRounds))
    assert rounds.rows == [20, 20, 20]
    assert rounds.metrics() == {"round": 2.0}
    assert {name for name in rounds.state_dict()["server"] if "classifier" in name}
    fresh = classification(folder, FFALoRA(rank=2), num_labels=3)
    fresh.configure_model()
    for name, value in fresh.state_dict().items():
        if name.endswith("lora_A"):
            assert torch.equal(value, state[name])
