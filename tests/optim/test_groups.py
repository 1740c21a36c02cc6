"""Parameter groups: every trainable once, heads apart, errors that name the parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject, set_trainable
from lora_lightning.adapters.base import GroupSpec
from lora_lightning.errors import TrainingError
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.optim.groups import build_optimizer, factor_pairs, group_specs, head_ratio


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_sides_and_heads_are_groups():
    net = model()
    inject(net, LoRA(rank=2, bias=True), ["0"], also_train=["1"])
    specs = group_specs(net)
    assert {name: len(spec.params) for name, spec in specs.items()} == {"A": 1, "B": 1, "other": 1, "head": 2}
    optimizer = build_optimizer(net, None)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["name"] for group in optimizer.param_groups] == ["A", "B", "other", "head"]


def test_the_rate_of_heads_is_a_ratio_of_the_optimizers():
    net = model()
    inject(net, LoRA(rank=2), ["0"], also_train=["1"])
    rates = {group["name"]: group["lr"] for group in build_optimizer(net, None, head_lr_ratio=5).param_groups}
    assert rates == pytest.approx({"A": 1e-3, "B": 1e-3, "head": 5e-3})


def test_a_new_head_learns_faster_unless_its_rate_is_given():
    assert [head_ratio(None, is_new=True), head_ratio(None, is_new=False), head_ratio(0.5, is_new=True)] == [
        3.0,
        1.0,
        0.5,
    ]


def test_two_adapters_have_groups_of_their_own():
    net = model()
    inject(net, LoRA(rank=2), ["0"], name="one")
    inject(net, LoRA(rank=2), ["0"], name="two")
    set_trainable(net, ["one", "two"])
    assert set(group_specs(net)) == {"one.A", "one.B", "two.A", "two.B"}
    assert len(factor_pairs(net)) == 2
    set_trainable(net, ["two"])
    assert set(group_specs(net)) == {"two.A", "two.B"}
    with disable_adapters(net):
        assert len(factor_pairs(net)) == 1


def test_nothing_trainable():
    net = model()
    inject(net, LoRA(rank=2), ["0"])
    net.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing trains: every parameter is frozen"):
        group_specs(net)


@pytest.mark.parametrize("share", [0, 2])
def test_a_method_that_forgets_or_repeats_a_parameter(monkeypatch, share):
    def groups(self, adapters):
        every = [p for adapter in adapters.values() for p in adapter.parameters()]
        return {"A": GroupSpec(params=every[:1]), "again": GroupSpec(params=every[: 2 if share else 1] * (share or 1))}

    monkeypatch.setattr(LoRA, "param_groups", groups)
    net = model()
    inject(net, LoRA(rank=2), ["0"])
    with pytest.raises(
        TrainingError, match=r"param_groups must hold every trainable exactly once; it does not for 0.*lora_"
    ):
        group_specs(net)
