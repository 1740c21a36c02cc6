from __future__ import annotations

import pytest
import torch
from adapted_models import METHOD, adapted, trainable
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterStateError, SettingsError, TargetError
from lora_lightning.injection.records import records
from lora_lightning.testing import TinyMLP, tiny_encoder


def test_inject_freezes_the_rest_and_reports() -> None:
    model = tiny_encoder()
    total = sum(p.numel() for p in model.parameters())
    report = ll.inject(model, METHOD, ["query"])
    own = 2 * (2 * 16 + 16 * 2)
    head = 16 * 16 + 16 + 3 * 16 + 3
    assert report.adapter_parameters == own
    assert report.trained == {
        "bert.pooler.dense.weight": 256,
        "bert.pooler.dense.bias": 16,
        "classifier.weight": 48,
        "classifier.bias": 3,
    }
    assert report.trainable_parameters == own + head
    assert report.total_parameters == total + own
    assert report.layers["bert.encoder.layer.0.attention.self.query"] == ("linear", 16, 16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == own + head
    text = str(report)
    assert f"LoRA on 2 layers: {own + head:,} of {total + own:,} parameters train" in text
    assert "fully trained: bert.pooler.dense.weight" in text


def test_names_and_shapes_of_parameters() -> None:
    model = adapted()
    assert set(model.state_dict()) == {
        f"{path}.{rest}"
        for path in ("first", "second")
        for rest in (
            "base.weight",
            "base.bias",
            "adapters.default.lora_A",
            "adapters.default.lora_B",
            "adapters.default.rank_mask",
        )
    }
    assert model.first.adapters.default.lora_A.shape == (2, 6)
    assert model.first.adapters.default.lora_B.shape == (8, 2)


def test_without_a_hugging_face_model_no_head_is_known_and_that_is_said() -> None:
    report = ll.inject(TinyMLP(), METHOD, ["first"])
    assert any("no head is known: what has no adapter stays frozen" in note for note in report.notes)
    assert ll.inject(TinyMLP(), METHOD, ["first"], also_train=["second"]).notes == ()


def test_seed_decides_the_start_and_none_takes_torchs() -> None:
    torch.manual_seed(5)
    first = TinyMLP()
    ll.inject(first, METHOD)
    torch.rand(3)
    second = TinyMLP()
    ll.inject(second, METHOD)
    third = TinyMLP()
    ll.inject(third, METHOD, seed=6)
    keys = [key for key in first.state_dict() if key.endswith("lora_A")]
    assert all(torch.equal(first.state_dict()[key], second.state_dict()[key]) for key in keys)
    assert not any(torch.equal(first.state_dict()[key], third.state_dict()[key]) for key in keys)
    assert records(first)["default"].seed == 5


def test_a_refused_injection_leaves_the_model_as_it_was() -> None:
    model = adapted(moved=False)
    before, names, active = model.state_dict(), trainable(model), model.first.active
    for options, error in (
        ({"name": "default"}, AdapterStateError),
        ({"name": "b", "targets": ["frist"]}, TargetError),
        ({"name": "b", "overrides": {"second": {"rank": 0}}}, SettingsError),
        ({"name": "a.b"}, SettingsError),
    ):
        with pytest.raises(error):
            ll.inject(model, METHOD, **options)  # type: ignore[arg-type]
    assert model.state_dict().keys() == before.keys()
    assert trainable(model) == names
    assert model.first.active == active
    assert list(records(model)) == ["default"]


def test_a_layer_that_trains_in_full_takes_no_adapter() -> None:
    model = TinyMLP()
    ll.inject(model, METHOD, ["first"], also_train=["second"])
    with pytest.raises(TargetError, match='second trains in full with adapter "default"; exclude it'):
        ll.inject(model, METHOD, ["second"], also_train=(), name="b")


@pytest.mark.timeout(30)
def test_a_thousand_layers() -> None:
    """In time linear in their number, or it would be far above the limit."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(1000)])
    report = ll.inject(model, LoRA(rank=1), exclude=["7"])
    assert len(report.layers) == 999
    ll.set_trainable(model, "default")
    ll.merge(model)
    ll.eject(model)
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_head_left_frozen_is_said_aloud() -> None:
    report = ll.inject(tiny_encoder(), LoRA(rank=2), ["query"], also_train=["pooler"])
    assert "note: the head classifier stays frozen as it was loaded; also_train does not name it." in str(report)
    assert not ll.inject(tiny_encoder(), LoRA(rank=2), ["query"]).notes
