"""Heads belong to an adapter: each has its own, the base model has its own, and each function shows the right one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import perturb, tiny_encoder

LoRA = plugins.method("LoRA")
IDS = torch.tensor([[4, 7, 9, 3]])


def trained(name: str, size: float, model: nn.Module | None = None, **options: object) -> nn.Module:
    """An encoder with one more adapter, whose factors and head have moved."""
    model = tiny_encoder().eval() if model is None else model
    ll.inject(model, LoRA(rank=2), ["query"], name=name, seed=0, **options)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter(name), size=size)
    with torch.no_grad():
        model.classifier.weight += size
        model.bert.pooler.dense.bias -= size
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    """Of the base model, and of each adapter alone in a model of its own."""
    alone = {name: logits(trained(name, size)) for name, size in (("a", 0.1), ("b", 0.3))}
    return {"base": logits(tiny_encoder().eval()), **alone}


def both() -> nn.Module:
    return trained("b", 0.3, trained("a", 0.1))


def test_each_of_two_adapters_has_its_own_head(expected) -> None:
    model = both()
    for names, key in (("b", "b"), ("a", "a"), ([], "base"), ("b", "b"), ("a", "a")):
        ll.set_active(model, names)
        assert torch.equal(logits(model), expected[key])


def test_disabled_adapters_leave_the_base_model_with_its_head(expected) -> None:
    model = both()
    with ll.disable_adapters(model):
        assert torch.equal(logits(model), expected["base"])
        with ll.disable_adapters(model):
            assert torch.equal(logits(model), expected["base"])
    assert torch.equal(logits(model), expected["b"])


@pytest.mark.parametrize(("ejected", "shown"), [("b", "base"), ("a", "b"), (None, "base")])
def test_an_ejected_adapter_takes_its_head_along(expected, ejected, shown) -> None:
    model = both()
    ll.eject(model, ejected)
    assert torch.equal(logits(model), expected[shown])
    left = {"a", "b"} - {ejected} if ejected else set()
    for name in left:
        ll.set_active(model, name)
        assert torch.equal(logits(model), expected[name])
    if left:
        ll.eject(model)
    assert torch.equal(logits(model), expected["base"])


def test_a_later_adapter_starts_from_the_head_of_the_base_model() -> None:
    model = trained("a", 0.1)
    ll.inject(model, LoRA(rank=2), ["query"], name="b")
    assert torch.equal(model.classifier.weight, tiny_encoder().classifier.weight)
    ll.inject(model, LoRA(rank=2), ["query"], name="c", also_train=())
    assert torch.equal(logits(model), logits(tiny_encoder().eval()))


def test_of_two_active_adapters_the_later_ones_head_counts() -> None:
    model = trained("c", 0.2, both(), also_train=["classifier"])
    heads = {}
    for name in "abc":
        ll.set_active(model, name)
        heads[name] = model.classifier.weight.clone(), model.bert.pooler.dense.bias.clone()
    ll.set_active(model, ["a", "c"])
    assert torch.equal(model.classifier.weight, heads["c"][0])
    assert torch.equal(model.bert.pooler.dense.bias, heads["a"][1])


def test_an_adapter_that_is_not_active_is_saved_with_its_own_head(expected, tmp_path) -> None:
    model = both()
    ll.set_active(model, [])
    for name in "ab":
        ll.save_adapter(model, tmp_path / name, name)
    assert torch.equal(logits(model), expected["base"])
    for name in "ab":
        alone = tiny_encoder().eval()
        ll.load_adapter(alone, tmp_path / name)
        assert torch.equal(logits(alone), expected[name])


def test_a_loaded_head_is_frozen_as_its_adapter_is(tmp_path) -> None:
    ll.save_adapter(trained("a", 0.1), tmp_path, "a")
    model = tiny_encoder()
    ll.load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    ll.set_trainable(model, "default")
    assert model.classifier.weight.requires_grad


def test_two_folders_with_a_head_each_are_loaded_into_one_model(expected, tmp_path) -> None:
    for name, size in (("a", 0.1), ("b", 0.3)):
        ll.save_adapter(trained(name, size), tmp_path / name, name)
    model = tiny_encoder().eval()
    for name in "ab":
        ll.load_adapter(model, tmp_path / name, name)
    for name in "aba":
        ll.set_active(model, name)
        assert torch.equal(logits(model), expected[name])
    ll.load_adapter(model, tmp_path / "b", "b")  # onto the one that is there and not active
    assert torch.equal(logits(model), expected["b"])
    with ll.disable_adapters(model):
        assert torch.equal(logits(model), expected["base"])


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_has_the_head_of_its_adapter(expected, tmp_path, form) -> None:
    from transformers import AutoModelForSequenceClassification

    model = both()
    ll.set_active(model, [])
    for name in "ab":
        ll.export(model, tmp_path / name, name=name, format=form)
        if form == "peft":
            alone = tiny_encoder().eval()
            ll.import_peft(alone, tmp_path / name)
        else:
            alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(logits(alone), expected[name], rtol=0, atol=1e-6)
    assert torch.equal(logits(model), expected["base"])


def test_a_head_trains_where_its_adapter_does() -> None:
    model = both()
    weight = model.classifier.weight
    assert weight.requires_grad
    ll.set_trainable(model, "a")
    assert not weight.requires_grad  # "b" is active
    ll.set_active(model, "a")
    assert weight.requires_grad
    assert model.classifier.weight is weight
    with ll.disable_adapters(model):
        assert not weight.requires_grad
    assert weight.requires_grad
    with pytest.raises(AdapterStateError, match=r'adapters "a" and "b" have a .* each, which the model has'):
        ll.set_trainable(model, ["a", "b"])


def test_a_head_that_was_frozen_by_hand_stays_frozen() -> None:
    model = trained("a", 0.1)
    model.classifier.weight.requires_grad_(False)
    with ll.disable_adapters(model):
        pass
    assert not model.classifier.weight.requires_grad


def test_the_base_models_logits_between_forward_and_backward_change_no_gradient() -> None:
    """A reference model's logits, as preference training takes them."""
    gradients = []
    for reference in (False, True):
        model = trained("a", 0.1)
        loss = model(input_ids=IDS).logits.square().sum()
        if reference:
            with ll.disable_adapters(model), torch.no_grad():
                model(input_ids=IDS)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_an_optimizer_goes_on_with_the_head_it_knows() -> None:
    model = trained("a", 0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS).logits.sum().backward()
    with ll.disable_adapters(model):
        pass
    before = model.classifier.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, before)


class Normalised(nn.Module):
    """A body, and a head with statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def test_statistics_change_hands_with_the_module_that_is_trained(tmp_path) -> None:
    model, x = Normalised(), torch.randn(8, 4)
    before = copy.deepcopy(model.norm.state_dict())
    ll.inject(model, LoRA(rank=2), ["body"], also_train=["norm", "head"], name="a")
    model.train()(x)
    own = copy.deepcopy(model.norm.state_dict())
    assert int(own["num_batches_tracked"]) == 1
    with ll.disable_adapters(model):
        assert all(torch.equal(value, before[key]) for key, value in model.norm.state_dict().items())
    assert all(torch.equal(value, own[key]) for key, value in model.norm.state_dict().items())
    ll.save_adapter(model, tmp_path, "a")
    ll.eject(model)
    assert all(torch.equal(value, before[key]) for key, value in model.norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_its_head_back(dtype) -> None:
    model = tiny_encoder().to(dtype).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    trained("a", 0.5, model)
    with ll.disable_adapters(model):
        found = logits(model)
    torch.testing.assert_close(found.to(dtype), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(tiny_encoder().to(dtype).classifier.weight, base_head(model).to(dtype))


def base_head(model: nn.Module) -> torch.Tensor:
    with ll.disable_adapters(model):
        return model.classifier.weight.detach().clone()


def test_a_copy_of_a_model_keeps_every_head(expected) -> None:
    model = both()
    other = copy.deepcopy(model)
    for name in "ab":
        ll.set_active(other, name)
        assert torch.equal(logits(other), expected[name])
    assert torch.equal(logits(model), expected["b"])


def test_a_trained_embedding_is_a_head_in_this_sense(expected) -> None:
    model = tiny_encoder().eval()
    ll.inject(model, LoRA(rank=2), ["query"], also_train=["word_embeddings"])
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight += 1
    assert not torch.equal(logits(model), expected["base"])
    with ll.disable_adapters(model):
        assert torch.equal(logits(model), expected["base"])
    ll.eject(model)
    assert torch.equal(logits(model), expected["base"])
