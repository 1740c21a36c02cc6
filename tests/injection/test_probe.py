"""What a probe reads, against autograd and plain sums, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_lightning.errors import SettingsError
from lora_lightning.injection import probe as probe_module
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.targets import select
from lora_lightning.models.anatomy import survey
from lora_lightning.testing import TinyMLP, tiny_encoder


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


class ConvNet(nn.Module):
    """Convolution, embedding-free, with an in-place activation behind a watched layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.out = nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(4, 2)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(self.act(self.conv(x))).mean(-1)))


def encoder_batches() -> list[dict[str, Tensor]]:
    ids = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
    return [
        {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 2])},
        {"input_ids": ids.flip(0), "attention_mask": (ids.flip(0) != 0).long(), "labels": torch.tensor([1, 1])},
    ]


@pytest.fixture
def mlp_case() -> tuple[nn.Module, list[Any]]:
    return TinyMLP().double(), [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]


def layers(model: nn.Module, *names: str):
    return select(survey(model), list(names), ()).layers


def by_autograd(model: nn.Module, batches: list[Any], loss: Any, path: str) -> Tensor:
    model = copy.deepcopy(model).eval()
    total = sum(loss(model, batch) for batch in batches) / len(batches)
    return torch.autograd.grad(total, model.get_submodule(path).weight)[0]


def test_gradients_are_those_of_autograd(mlp_case):
    model, batches = mlp_case
    with Probe(batches, mean_square).on(model, layers(model, "first", "second")) as probe:
        found = probe.gradients()
    for path in ("first", "second"):
        expected = by_autograd(model, batches, mean_square, path)
        torch.testing.assert_close(found[path], expected, rtol=0, atol=1e-14)
        assert found[path].device.type == "cpu"


def test_gradients_of_a_frozen_encoder_and_a_convolution():
    model, batches = tiny_encoder().double(), encoder_batches()
    model.requires_grad_(False)
    wanted = layers(model, "query", "output.dense")
    with Probe(batches).on(model, wanted) as probe:
        found = probe.gradients()
    model.requires_grad_(True)
    assert len(found) == 6
    for path, gradient in found.items():
        expected = by_autograd(model, batches, lambda m, b: m(**b).loss, path)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    net = ConvNet().double()
    x = [torch.randn(4, 3, 6, dtype=torch.float64)]
    with Probe(x, mean_square).on(net, layers(net, "conv", "out")) as probe:
        found = probe.gradients()
    expected = by_autograd(net, x, mean_square, "conv").flatten(1)
    torch.testing.assert_close(found["conv"], expected, rtol=0, atol=1e-14)


def test_a_layer_that_is_called_twice_adds_both_gradients():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, batches = Twice(), [torch.randn(4, 3, dtype=torch.float64)]
    with Probe(batches, mean_square).on(model, layers(model, "layer")) as probe:
        found = probe.gradients()["layer"]
    torch.testing.assert_close(found, by_autograd(model, batches, mean_square, "layer"), rtol=0, atol=1e-14)


def test_covariances_are_means_over_tokens_that_count():
    model, batches = tiny_encoder().double(), encoder_batches()
    path = "bert.encoder.layer.1.attention.self.query"
    with Probe(batches).on(model, layers(model, "query")) as probe:
        covariance, inputs = probe.covariances()[path], probe.inputs([path])[path]
    seen = np.concatenate(
        [x.numpy()[batch["attention_mask"].numpy().astype(bool)] for x, batch in zip(inputs, batches, strict=True)]
    )
    assert len(seen) == 14
    np.testing.assert_allclose(covariance.numpy(), seen.T @ seen / len(seen), atol=1e-12)


def test_inputs_are_those_of_any_module(mlp_case):
    model, batches = mlp_case
    with Probe(batches, mean_square).on(model, layers(model, "first")) as probe:
        found = probe.inputs(["first", "second"])
    assert all(torch.equal(a, b) for a, b in zip(found["first"], batches, strict=True))
    for a, b in zip(found["second"], batches, strict=True):
        assert torch.equal(a, torch.tanh(model.first(b)).detach())


def test_what_enters_and_leaves_blocks_is_reduced_call_by_call_and_held_once():
    model, batches = tiny_encoder().double(), encoder_batches()
    blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    masks = []

    def first(path: str, x: Tensor, mask: Tensor | None) -> Tensor:
        masks.append(mask)
        return x[:, 0]

    with Probe(batches).on(model, {}) as probe:
        found = probe.around(blocks, first)
    states = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    for number, block in enumerate(blocks):
        for side, x in enumerate(found[block]):
            expected = torch.cat([s[number + side][:, 0] for s in states])
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)
    assert torch.equal(masks[0], batches[0]["attention_mask"])


def test_a_module_that_is_called_by_keyword_and_answers_a_tuple_is_seen():
    class Block(nn.Module):
        def forward(self, mask: None, hidden: Tensor) -> tuple[Tensor, None]:
            return 2 * hidden, None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = Block(), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.block(mask=None, hidden=x)[0])

    x = torch.randn(4, 3)
    with Probe([x, x + 1], mean_square).on(Net(), {}) as probe:
        before, after = probe.around(["block"], lambda path, seen, mask: seen)["block"]
    assert torch.equal(before, torch.cat([x, x + 1]))
    assert torch.equal(after, 2 * before)


def test_a_pass_that_takes_long_shows_a_bar(mlp_case, monkeypatch, capsys):
    model, batches = mlp_case
    monkeypatch.setattr(probe_module, "SILENT", 0.0)
    with Probe(batches, mean_square).on(model, layers(model, "first")) as probe:
        probe.losses()
    assert re.search(r"calibration, pass 1: .*0/3 .* batches", capsys.readouterr().err)


def test_losses_and_the_count_of_passes(mlp_case):
    model, batches = mlp_case
    probe = Probe(iter(batches), mean_square)
    with probe.on(model, layers(model, "first")):
        assert probe.losses() == [mean_square(model, batch).item() for batch in batches]
        probe.gradients()
    assert probe.passes == 2
    assert not probe.layers  # nothing of the model is held


def test_a_pass_leaves_nothing_behind():
    net = ConvNet().train()
    net.drop.eval()
    net.out.weight.requires_grad_(False)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    before = copy.deepcopy(net)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    def noisy(model: nn.Module, batch: Tensor) -> Tensor:
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        return mean_square(model, batch) * torch.rand(())

    batches = [torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    with Probe(batches, noisy).on(net, layers(net, "out", "conv")) as probe:
        probe.gradients()
        probe.inputs()
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    for (name, own), (_, old) in zip(net.named_modules(), before.named_modules(), strict=True):
        assert own.training == old.training, name
        assert not own._forward_hooks
    for (name, own), (_, old) in zip(net.named_parameters(), before.named_parameters(), strict=True):
        assert own.requires_grad == old.requires_grad, name
        assert own.grad is None or (name == "conv.weight" and bool((own.grad == 1).all()))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))


def test_a_pass_that_fails_leaves_nothing_behind(mlp_case):
    model, batches = mlp_case
    model.train()

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("out of data")

    with Probe(batches, fails).on(model, layers(model, "first")) as probe, pytest.raises(RuntimeError, match="of data"):
        probe.gradients()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not model.first._forward_hooks


def test_a_probe_moves_the_model_and_back(mlp_case):
    model, _ = mlp_case
    seen = []

    def loss(moved: nn.Module, batch: Any) -> Tensor:
        seen.append((next(moved.parameters()).device.type, batch["x"][0].device.type))
        return torch.zeros(())

    values = copy.deepcopy(model.state_dict())
    with Probe([{"x": [torch.ones(2, 6)]}], loss, device="cpu").on(model, layers(model, "first")) as probe:
        probe.losses()
    assert seen == [("cpu", "cpu")]
    assert all(torch.equal(values[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("ask", "loss", "message"),
    [
        (lambda p: p.inputs(), lambda m, b: m.first(b).mean(), "never call second"),
        (lambda p: p.gradients(), lambda m, b: m.first(b).mean() + 0 * m(b).detach().mean(), "not depend on second"),
        (lambda p: p.covariances(["frist"]), mean_square, 'Did you mean "first"'),
    ],
)
def test_what_nothing_is_known_of_is_an_error(mlp_case, ask, loss, message):
    model, batches = mlp_case
    with Probe(batches, loss).on(model, layers(model, "first", "second")) as probe:
        with pytest.raises(SettingsError, match=message):
            ask(probe)
        assert all(p.requires_grad for p in model.parameters())


def test_there_must_be_batches(mlp_case):
    model, _ = mlp_case
    probe = Probe([], mean_square)
    with probe.on(model, layers(model, "first")), pytest.raises(SettingsError, match="probe=Probe"):
        probe.covariances()


def test_a_covariance_is_that_of_linear_layers():
    net = ConvNet()
    probe = Probe([torch.randn(4, 3, 6)], mean_square)
    with probe.on(net, layers(net, "conv")), pytest.raises(SettingsError, match="conv is of kind conv"):
        probe.covariances()
