from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import METHOD, X, adapted
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.records import records
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder, tiny_encoder


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merge_is_all_or_nothing(keep: bool, value: float) -> None:
    model = adapted()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.second.adapters.default.lora_B[0, 0] = value
    with pytest.raises(AdapterStateError, match=r'second: adapter "default": lora_B .* not finite. Nothing was merged'):
        ll.merge(model, keep_original=keep)
    assert model.first.merged == ()
    assert torch.equal(model.first.base.weight, before["first.base.weight"])


def test_an_overflow_in_half_precision_merges_nothing() -> None:
    model = TinyMLP().half()
    ll.inject(model, METHOD)
    perturb(model.first.adapters)
    with torch.no_grad():
        for parameter in model.second.adapters.parameters():
            parameter.fill_(1e4)
    before = model.first.base.weight.clone()
    with pytest.raises(AdapterStateError, match=r"second: the merged weight overflows torch\.float16"):
        ll.merge(model, keep_original=False)
    assert torch.equal(model.first.base.weight, before)


def test_merge_twice_and_unmerge_twice_do_nothing_more() -> None:
    model = adapted()
    before, weight = model(X), model.first.base.weight.clone()
    ll.unmerge(model)
    ll.merge(model)
    once = model.first.base.weight.clone()
    ll.merge(model)
    assert torch.equal(model.first.base.weight, once)
    ll.unmerge(model)
    ll.unmerge(model)
    assert torch.equal(model.first.base.weight, weight)
    assert torch.equal(model(X), before)


def test_merge_of_nothing_is_an_error() -> None:
    model = adapted()
    ll.set_active(model, [])
    with pytest.raises(AdapterStateError, match="no adapter is active, so there is nothing to merge"):
        ll.merge(model)


def test_merge_of_a_tied_weight_is_refused_whoever_put_the_adapter_there(tmp_path: Path) -> None:
    model = tiny_decoder(tied=True)
    ll.inject(model, METHOD, ["lm_head", "q_proj"])
    ll.save_adapter(model, tmp_path)
    loaded = tiny_decoder(tied=True)
    ll.load_adapter(loaded, tmp_path)
    for tied in (model, loaded):
        before = tied.lm_head.base.weight.clone()
        with pytest.raises(AdapterStateError, match=r"lm_head shares its weight with model\.embed_tokens, which"):
            ll.merge(tied)
        assert torch.equal(tied.lm_head.base.weight, before)
        assert not any(layer.merged for _, layer in ll.iter_adapters(tied))


def test_unmerge_without_originals_restores_nothing() -> None:
    model = adapted()
    model.second.merge(keep_original=False)
    model.first.merge()
    merged = model.first.base.weight.clone()
    with pytest.raises(AdapterStateError, match="keep_original=False; the original weights are gone"):
        ll.unmerge(model)
    assert torch.equal(model.first.base.weight, merged)


def test_eject_one_of_two() -> None:
    model = adapted("b", adapted("a"))
    ll.merge(model)
    ll.eject(model, "b")
    assert list(records(model)) == ["a"]
    assert model.first.active == ()
    assert torch.equal(model(X), TinyMLP()(X))
    ll.set_active(model, "a")
    assert torch.equal(model(X), adapted("a")(X))
    ll.eject(model, "a")
    assert isinstance(model.first, nn.Linear)
    with pytest.raises(AdapterStateError, match="TinyMLP has no adapters"):
        ll.eject(model)


def test_eject_of_what_is_merged() -> None:
    model = adapted()
    ll.merge(model)
    ll.eject(model)
    assert torch.equal(model(X), TinyMLP()(X))
    model = adapted("b", adapted("a"))
    ll.merge(model, keep_original=False)
    merged = model(X)
    with pytest.raises(AdapterStateError, match="first: merged with keep_original=False; eject all adapters or none"):
        ll.eject(model, "b")
    assert isinstance(model.first, AdaptedLayer)
    ll.eject(model)
    assert torch.equal(model(X), merged)
    assert isinstance(model.first, nn.Linear)


@pytest.mark.parametrize("merged", [False, True])
def test_eject_restores_the_structure_and_the_head_unless_it_was_merged_for_good(merged) -> None:
    model = tiny_encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ll.inject(model, METHOD)
    perturb(model.classifier)
    trained = model.classifier.weight.clone()
    if merged:
        ll.merge(model, keep_original=False)
    ll.eject(model)
    assert set(model.state_dict()) == set(before)
    assert torch.equal(model.classifier.weight, trained if merged else before["classifier.weight"])
    ll.inject(model, METHOD)


def test_what_is_said_after_a_final_merge_helps(tmp_path: Path) -> None:
    model = tiny_encoder()
    ll.inject(model, METHOD, ["query"])
    ll.save_adapter(model, tmp_path / "a")
    perturb(model.bert.encoder.layer[0].attention.self.query.adapters)
    ll.merge(model, keep_original=False)
    refused = {
        "unmerge": lambda: ll.unmerge(model),
        "inject": lambda: ll.inject(model, METHOD, ["query"], name="b"),
        "active": lambda: ll.set_active(model, []),
        "save": lambda: ll.save_adapter(model, tmp_path / "b"),
        "disable": lambda: ll.disable_adapters(model).__enter__(),
    }
    for call in refused.values():
        with pytest.raises(AdapterStateError, match=r"eject\(model\) makes it a plain model .* with load_adapter\."):
            call()
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    ll.eject(model)
    assert torch.equal(model(ids).logits, before)
    ll.inject(model, METHOD, ["query"])
    fresh = tiny_encoder()
    ll.load_adapter(fresh, tmp_path / "a")
