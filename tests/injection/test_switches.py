from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_models import METHOD, X, adapted, trainable
from torch import Tensor

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.records import trainable_adapters
from lora_lightning.methods import Method
from lora_lightning.testing import TinyMLP, tiny_encoder


def test_the_newest_adapter_is_the_only_active_and_trainable_one() -> None:
    model = adapted("a")
    adapted("b", model, targets=["first"])
    assert model.first.active == ("b",)
    assert model.second.active == ()
    assert trainable(model) == {f"first.adapters.b.lora_{side}" for side in "AB"}
    alone = adapted("b", targets=["first"])
    assert torch.equal(model(X), alone(X))
    assert list(trainable_adapters(model)) == ["first.adapters.b"]


def test_active_trainable_and_merged_are_three_states() -> None:
    model = adapted("b", adapted("a"))
    ll.set_active(model, "a")
    assert model.first.active == ("a",)
    assert all(".adapters.b." in name for name in trainable(model))
    ll.set_trainable(model, ["a", "b"])
    assert {name.split(".")[2] for name in trainable(model)} == {"a", "b"}
    assert model.first.active == ("a",)
    ll.merge(model)
    assert model.first.merged == ("a",)
    ll.set_trainable(model, [])
    assert trainable(model) == set()
    assert model.first.merged == ("a",)
    ll.unmerge(model)
    assert model.first.active == ("a",)
    assert torch.equal(model(X), adapted("a")(X))


def test_heads_train_with_their_adapter() -> None:
    model = tiny_encoder()
    ll.inject(model, METHOD, ["query"], name="a")
    ll.inject(model, METHOD, ["query"], name="b", also_train=())
    assert not model.classifier.weight.requires_grad
    ll.set_trainable(model, "a")
    assert not model.classifier.weight.requires_grad  # "b" is active, and the model shows the base model's head
    ll.set_active(model, "a")
    assert model.classifier.weight.requires_grad
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_additive_adapters_sum_in_any_order() -> None:
    model = adapted("b", adapted("a")).double()
    x = X.double()
    base = TinyMLP().double()
    hidden = base.first(x)
    updates = [
        2.0 * x @ model.first.adapters[name].lora_A.T @ model.first.adapters[name].lora_B.T for name in ("a", "b")
    ]
    for names in (["a", "b"], ["b", "a"]):
        ll.set_active(model, names)
        torch.testing.assert_close(model.first(x), hidden + sum(updates))
    ll.set_active(model, [])
    assert torch.equal(model(x), base(x))


class Replaces(Adapter):
    """An update that depends on the weight below it."""

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base.apply(x, self.merged_weight(base.weight()), base.bias)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def reset(self, generator: torch.Generator) -> None:
        pass


class Doubling(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Replaces()


def test_what_cannot_be_stacked_is_refused_as_a_whole() -> None:
    model = adapted("a")
    ll.inject(model, Doubling(), ["second"], name="b")
    ll.set_active(model, "a")
    with pytest.raises(AdapterStateError, match=r"a \(LowRankAdapter\), b \(Replaces\) cannot be active together"):
        ll.set_active(model, ["a", "b"])
    assert model.first.active == model.second.active == ("a",)


@pytest.mark.parametrize("switch", [ll.set_active, ll.set_trainable])
def test_unknown_names_are_refused_with_the_nearest(switch: Any) -> None:
    model = adapted("task_one")
    with pytest.raises(AdapterStateError, match=r'no adapter "task_on". Did you mean "task_one"\? Installed: task_one'):
        switch(model, ["task_on"])
    assert model.first.active == ("task_one",)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(AdapterStateError, match="a, a names an adapter twice"):
        ll.set_active(adapted("a"), ["a", "a"])


def test_another_set_cannot_become_active_while_one_is_merged() -> None:
    model = adapted("b", adapted("a"))
    ll.merge(model)
    with pytest.raises(AdapterStateError, match="b is merged; call unmerge first"):
        ll.set_active(model, "a")
    ll.set_active(model, "b")


def test_disable_gives_the_base_function_even_while_merged() -> None:
    model, base = adapted(), TinyMLP()
    ll.merge(model)
    merged = model(X)
    with ll.disable_adapters(model):
        assert torch.equal(model(X), base(X))
        with ll.disable_adapters(model):
            assert torch.equal(model(X), base(X))
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), merged)
    ll.unmerge(model)
    assert torch.equal(model.first.base.weight, base.first.weight)


def test_disable_ends_with_an_error_inside() -> None:
    model = adapted()
    before = model(X)
    with pytest.raises(ZeroDivisionError), ll.disable_adapters(model):
        _ = 1 / 0
    assert torch.equal(model(X), before)


def test_disable_is_refused_where_the_base_is_gone() -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    with pytest.raises(AdapterStateError, match="the base model's function is gone"), ll.disable_adapters(model):
        pass
