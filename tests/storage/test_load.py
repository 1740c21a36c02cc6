from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import METHOD, X, adapted, refused, rewrite
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError, AdapterStateError, UnknownMethodError
from lora_lightning.injection.records import records
from lora_lightning.methods import plain_settings
from lora_lightning.storage import load
from lora_lightning.storage.stored import FILE
from lora_lightning.testing import TinyMLP, tiny_encoder


def test_a_loaded_adapter_is_active_and_frozen_and_leaves_others_alone(folder: Path) -> None:
    model = adapted(method=LoRA(rank=1), name="mine", targets=["first"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    ll.load_adapter(model, folder, "theirs")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert model.first.active == model.second.active == ("theirs",)
    assert torch.equal(model(X), adapted()(X))
    ll.set_trainable(model, "theirs")
    assert all(".adapters.theirs." in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_travels_under_another_name(tmp_path: Path) -> None:
    model = adapted(name="a")
    ll.save_adapter(model, tmp_path, "a")
    fresh = TinyMLP()
    ll.load_adapter(fresh, tmp_path, "b")
    assert list(records(fresh)) == ["b"]
    assert torch.equal(fresh(X), model(X))


def test_loading_onto_an_existing_name_replaces_tensors_and_never_wraps_twice(folder: Path) -> None:
    model = TinyMLP()
    ll.inject(model, METHOD, seed=9)
    adapter, trains = model.first.adapters.default, {n for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        ll.load_adapter(model, folder)
    assert model.first.adapters.default is adapter
    assert isinstance(model.first.base, nn.Linear)
    assert torch.equal(model(X), adapted()(X))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LoRA(rank=2, alpha=8.0), {}, r'has alpha=4.0 on first; adapter "default" has 8.0; load it under another name'),
        (METHOD, {"overrides": {"second": {"dropout": 0.1}}}, r'has dropout=0.0 on second; adapter "default" has 0.1'),
        (METHOD, {"targets": ["first"]}, r'adapts other layers than adapter "default", such as second'),
        (METHOD, {"targets": ["first"], "also_train": ["second"]}, r"adapts other layers|other names"),
    ],
)
def test_an_existing_adapter_takes_only_its_own_kind(folder: Path, method: LoRA, options: Any, message: str) -> None:
    model = TinyMLP()
    ll.inject(model, method, **options)
    refused(model, folder, message)


def test_an_existing_adapter_of_another_method_is_refused(folder: Path) -> None:
    model = TinyMLP()
    ll.inject(model, ll.method("RoseLoRA")(rank=2, alpha=4.0))
    refused(model, folder, r"holds LoRA; adapter 'default' is RoseLoRA; load it under another name, or eject first")


def test_an_existing_adapter_with_other_heads_is_refused(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder(), also_train=["classifier"]), tmp_path)
    model = adapted(tiny_encoder(), also_train=["classifier.weight"])
    refused(model, tmp_path, r'trains other heads than adapter "default", such as classifier.bias')


def test_a_merged_model_takes_no_adapter(folder: Path) -> None:
    model = adapted()
    ll.merge(model)
    for name in ("other", "default"):
        refused(model, folder, "first: default is merged; call unmerge first", name, AdapterStateError)


def test_a_method_whose_plugin_is_missing(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description.update(method="LoRAX"))
    refused(
        TinyMLP(), folder, r'adapter": no method "LoRAX". Did you mean "LoRA"\? Installed: ', error=UnknownMethodError
    )


def test_settings_of_a_newer_plugin(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description["settings"].update(magic=1))
    refused(TinyMLP(), folder, r'adapter": settings: LoRA has no "magic"')
    rewrite(folder, lambda description, tensors: description.update(settings={**plain_settings(METHOD), "rank": 0}))
    refused(TinyMLP(), folder, r'adapter": LoRA.rank is 0; it must be at least 1')


def test_another_architecture(folder: Path) -> None:
    refused(tiny_encoder(), folder, "was trained on TinyMLP; this model is BertForSequenceClassification")


def test_other_names_or_shapes(folder: Path) -> None:
    model = TinyMLP()
    model.second = nn.Linear(8, 5)
    refused(model, folder, "was trained on a TinyMLP whose parameters have other names or shapes")


def test_other_base_weights(folder: Path) -> None:
    refused(
        TinyMLP(seed=1), folder, "was trained on other base weights than this model has .*; load the same pretrained"
    )


def test_heads_of_another_size(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder(num_labels=3)), tmp_path)
    refused(tiny_encoder(num_labels=4), tmp_path, r"classifier.(weight|bias) has shape \(3.*; the model needs \(4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("first.adapters.default.lora_A"), r"1 tensors missing, 0 unexpected, such as first.adapters"),
        (
            lambda t: t.update({"first.adapters.default.lora_C": torch.zeros(1)}),
            r"0 tensors missing, 1 unexpected, .*lora_C",
        ),
        (
            lambda t: t.update({"third.weight": torch.zeros(1)}),
            r"0 tensors missing, 1 unexpected, such as third.weight",
        ),
        (
            lambda t: t.update({"first.adapters.default.lora_A": torch.zeros(3, 6)}),
            r"first.adapters.default.lora_A has shape \(3, 6\); the model needs \(2, 6\)",
        ),
    ],
)
@pytest.mark.parametrize("present", [False, True])
def test_keys_are_compared_exactly(folder: Path, change: Callable[[Any], None], message: str, present: bool) -> None:
    rewrite(folder, lambda description, tensors: change(tensors))
    refused(adapted() if present else TinyMLP(), folder, message)


def test_a_layer_the_model_lacks(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description["layers"].update(thrid={}))
    refused(TinyMLP(), folder, "adapts thrid, which this model lacks")


def test_a_missing_head(tmp_path: Path) -> None:
    ll.save_adapter(adapted(tiny_encoder()), tmp_path)
    rewrite(tmp_path, lambda description, tensors: tensors.pop("classifier.bias"))
    refused(tiny_encoder(), tmp_path, "1 tensors missing, 0 unexpected, such as classifier.bias")


OLD = Path(__file__).parents[1] / "old_files"


@pytest.mark.parametrize("kind", ["lora", "rose", "dora", "lorasc", "lorasc_lora", "celora", "moe"])
def test_adapters_of_0_1_load_bit_for_bit(kind: str) -> None:
    folder = OLD / "runs" / kind / "001" / "adapter"
    model = BertForSequenceClassification.from_pretrained(OLD / "model", num_labels=_labels(folder)).eval()
    ll.load_adapter(model, folder)
    state, stored = model.state_dict(), load_file(folder / FILE)
    assert stored
    for key, tensor in stored.items():
        assert torch.equal(state[key], tensor), key


def _labels(folder: Path) -> int:
    return len(load_file(folder / FILE)["classifier.bias"])


# -- what was read is in the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first.weight", "first.base.weight", "bert.embeddings.position_ids"])
def test_a_file_has_no_say_over_frozen_weights(name: str, tmp_path: Path) -> None:
    """A tensor that no save of an adapter writes is refused, though the model has one of its name and shape."""
    make = tiny_encoder if name.startswith("bert") else TinyMLP
    model = make()
    shape = dict(model.state_dict(), **dict(model.named_buffers())).get(name, torch.zeros(8, 6)).shape
    ll.save_adapter(adapted(make()), tmp_path)
    rewrite(tmp_path, lambda description, tensors: tensors.update({name: torch.ones(shape)}))
    for target in (model, adapted(make())):
        refused(target, tmp_path, f"0 tensors missing, 1 unexpected, such as {name}")


def test_a_buffer_of_a_head_that_trains_belongs_to_it(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.BatchNorm1d(8)})

    model = adapted(make(), targets=["body"], also_train=["head"])
    with torch.no_grad():
        model["head"].running_mean.fill_(3.0)
    ll.save_adapter(model, tmp_path)
    fresh = make()
    ll.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh["head"].running_mean, torch.full((8,), 3.0))


def test_a_tensor_that_did_not_reach_its_place_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a method or a strategy does when tensors are put into it, they are looked up once more."""
    real = load.put

    def lost(target: torch.Tensor, value: torch.Tensor) -> None:
        if value.shape != (4, 2):
            real(target, value)

    monkeypatch.setattr(load, "put", lost)
    said = r"second\.adapters\.default\.lora_B is not in the model as the file states it"
    with pytest.raises(AdapterFileError, match=said):
        ll.load_adapter(TinyMLP(), folder)


def test_numbers_that_are_rounded_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ll.save_adapter(adapted(TinyMLP().double()), tmp_path)
    model = TinyMLP()
    ll.load_adapter(model, tmp_path)
    said = r"note: .* tensors are rounded, such as first\.adapters\.\w+\.\w+, which is float64 there and float32 in the"
    assert re.search(said, capsys.readouterr().out)
    stored = load_file(tmp_path / FILE)
    for key, tensor in model.state_dict().items():
        if ".adapters." in key:
            assert torch.equal(tensor, stored[key].to(tensor.dtype))


@pytest.mark.parametrize("owners", [["first"], [""], ["nowhere"]])
def test_what_layers_share_stands_where_the_file_says(owners: list[str], folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description.update(linked=owners))
    refused(TinyMLP(), folder, r"states that layers share what lies at \[.*\]; LoRA has it at \[\] in this model")


def test_a_model_that_cannot_be_copied_is_saved_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(anatomy: Any) -> None:
        raise TypeError("no copies of this")

    monkeypatch.setattr(load, "new_skeleton", fails)
    ll.save_adapter(adapted(), tmp_path)
    said = "reads back from the disk, but no second model could be made to try it on: no copies of this"
    assert said in capsys.readouterr().out
    ll.load_adapter(TinyMLP(), tmp_path)
