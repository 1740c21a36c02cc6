"""Running statistics of frozen layers stay, or are trained and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from model_classes import model_class
from projects import fit
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.testing import perturb

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    net.train()(X)  # statistics of the pretraining
    return net


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(net[1].state_dict())


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_of_a_frozen_layer_stay_and_are_used(affine) -> None:
    net = network()
    if not affine:
        net[1].weight = net[1].bias = None
    before, expected = statistics(net), copy.deepcopy(net).eval()(X)
    report = ll.inject(net, LoRA(rank=2), ["0", "3"], also_train=())
    assert any("1 layer with running statistics, such as 1, keep them" in note for note in report.notes)
    net.train()
    torch.testing.assert_close(net(X), expected)  # as in evaluation, whatever mode the network is in
    assert same(statistics(net), before)


def test_a_saved_adapter_gives_the_same_outputs_on_the_base_it_was_trained_on(tmp_path) -> None:
    net = network()
    ll.inject(net, LoRA(rank=2), ["0", "3"], also_train=())
    for _, layer in ll.iter_adapters(net):
        perturb(layer.adapter("default"), size=0.2)
    for _ in range(3):
        net.train()(X).sum().backward()
    ll.save_adapter(net, tmp_path)
    other = network()
    ll.load_adapter(other, tmp_path)
    assert torch.equal(other.eval()(X), net.eval()(X))


def test_a_layer_that_trains_has_statistics_that_train_and_are_saved(tmp_path) -> None:
    net = network()
    before = statistics(net)
    report = ll.inject(net, LoRA(rank=2), ["0", "3"], also_train=["1"])
    assert not any("running statistics" in note for note in report.notes)
    net.train()(X + 5)
    own = statistics(net)
    assert not torch.equal(own["running_mean"], before["running_mean"])
    ll.save_adapter(net, tmp_path)
    other = network()
    ll.load_adapter(other, tmp_path)
    assert same(statistics(other), own)
    assert torch.equal(other.eval()(X), net.eval()(X))
    other.train()(X)  # loaded and frozen
    assert same(statistics(other), own)


def test_after_eject_the_layer_trains_as_before() -> None:
    net = network()
    before = statistics(net)
    ll.inject(net, LoRA(rank=2), ["0"], also_train=(), name="a")
    ll.inject(net, LoRA(rank=2), ["0"], also_train=(), name="b")
    ll.eject(net, "a")
    net.train()(X)
    assert same(statistics(net), before)
    ll.eject(net)
    net.train()(X)
    assert not torch.equal(statistics(net)["running_mean"], before["running_mean"])
    assert not net[1]._forward_pre_hooks


def test_copies_and_other_kinds_of_layers_with_statistics() -> None:
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d(3), "instance": nn.InstanceNorm2d(3, track_running_stats=True)}
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1), *norms.values(), nn.SyncBatchNorm(3), nn.BatchNorm2d(3, track_running_stats=False)
    )
    ll.inject(net, LoRA(rank=1), ["0"], also_train=())
    net = copy.deepcopy(net)
    before = copy.deepcopy(net.state_dict())
    net.train()(torch.randn(2, 3, 4, 4))
    assert same(before, net.state_dict())
    assert net[4].training  # it has none, so it normalises by its batch


@pytest.mark.filterwarnings("ignore")
def test_ranges_of_activations_stay(tmp_path) -> None:
    """I-BERT widens them in every training step, and quantizes by them; they are no running mean."""
    found = model_class("IBertForSequenceClassification")
    model = found.build()
    report = ll.inject(model, LoRA(rank=2), ["classifier.dense"], also_train=())
    assert any("layers with running statistics" in note for note in report.notes)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(**found.batch(model, torch.tensor([[5, 6, 7, 9]])))
    assert same(before, dict(model.named_buffers()))
    ll.save_adapter(model, tmp_path)
    ll.load_adapter(found.build(), tmp_path)


class Project(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_project_of_somebody_elses(tmp_path) -> None:
    module = Project()
    before = statistics(module.net)
    fit(module, tmp_path, [InjectAdapters(LoRA(rank=2), ["net.0", "net.3"], directory=tmp_path / "adapter")])
    assert same(statistics(module.net), before)
    plain = Project()
    ll.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.eval().net(X), module.eval().net(X))
