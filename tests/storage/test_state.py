from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_files import METHOD, X, adapted
from torch import Tensor, nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError, AdapterStateError
from lora_lightning.storage.state import adapter_keys
from lora_lightning.storage.stored import read_folder
from lora_lightning.testing import TinyMLP


class WithStatistics(nn.Module):
    """A head with running statistics, which are part of what was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyMLP()
        self.head = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_buffers_of_trained_heads_are_saved(tmp_path: Path) -> None:
    model = adapted(WithStatistics(), also_train=["head"])
    model.train()(X)
    ll.save_adapter(model, tmp_path)
    fresh = WithStatistics()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(X), model.eval()(X))


class Banded(nn.Module):
    """A head that adds a mask of its own to what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = TinyMLP(), nn.Linear(4, 4)
        self.head.register_buffer("mask", torch.full((4,), -torch.inf).index_fill(0, torch.tensor([1, 2]), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x)) + self.head.mask).softmax(-1)


def test_a_head_whose_mask_is_infinite_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fresh = adapted(Banded(), targets=["first"], also_train=["head"]), Banded()
    ll.save_adapter(model, tmp_path)
    fresh.head.mask.zero_()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    for name, value in (("head.mask", torch.nan), ("head.weight", torch.inf)):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_submodule("head").state_dict()[name.removeprefix("head.")].view(-1)[0] = value
        with pytest.raises(AdapterFileError, match=rf"NaN or infinite in {name}"):
            ll.save_adapter(broken, tmp_path)


def test_frozen_sides_and_masks_are_saved(tmp_path: Path) -> None:
    model = adapted(method=LoRA(rank=3, train="B"))
    model.first.adapters.default.rank_mask[1] = False
    ll.save_adapter(model, tmp_path)
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    assert fresh.first.adapters.default.rank_mask.tolist() == [True, False, True]
    assert "lora_A" not in dict(fresh.first.adapters.default.named_parameters())


def test_each_adapter_is_saved_alone(tmp_path: Path) -> None:
    model = adapted(adapted(), LoRA(rank=1), "second")
    ll.save_adapter(model, tmp_path, "second")
    assert all(".adapters.second." in key for key in read_folder(tmp_path).tensors)
    both = {*adapter_keys(model, "default"), *adapter_keys(model, "second")}
    assert set(adapter_keys(model)) == both
    assert len(adapter_keys(model)) == len(both)
    with pytest.raises(
        AdapterStateError, match=r'no adapter "secnd". Did you mean "second"\? Installed: default, second'
    ):
        ll.save_adapter(model, tmp_path, "secnd")


def test_keys_of_a_containing_module_carry_its_prefix() -> None:
    whole = nn.ModuleDict({"net": adapted()})
    assert adapter_keys(whole) == [f"net.{key}" for key in adapter_keys(whole["net"])]
    assert set(adapter_keys(whole)) <= set(whole.state_dict())


class OwnAdapters(nn.Module):
    """A base model with modules of its own called as ours are."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"default": nn.Linear(6, 6)})
        self.body = TinyMLP()


def test_a_base_models_own_adapters_are_base() -> None:
    model = nn.ModuleDict({"x": OwnAdapters()})
    ll.inject(model, METHOD, ["first"])
    assert all(key.startswith("x.body.first.adapters.default.") for key in adapter_keys(model))
