"""Two DoRA adapters on one layer: each travels and is switched to, and both at once compute, as in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import PEFT_WARNINGS, DoRA, LoRA, llama, randomise, seeded
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import perturb

pytestmark = PEFT_WARNINGS
IDS = torch.tensor([[5, 6, 7, 8]])
NAMES = ("one", "two")


def settings(targets: list[str], rank: int) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=4, use_dora=True, target_modules=targets)


def two(folder: Path) -> Any:
    """A model with two adapters, each exported on its own."""
    model = llama()
    for number, name in enumerate(NAMES):
        ll.inject(model, DoRA(rank=2), ["q_proj", "v_proj"], also_train=(), name=name, seed=number)
        for layer in (layer for layer in model.modules() if hasattr(layer, "adapters")):
            perturb(layer.adapter(name))
        ll.export(model, folder / name, name=name)
    return model


def in_peft(folder: Path) -> Any:
    theirs = peft.PeftModel.from_pretrained(llama(), folder / "one", adapter_name="one")
    theirs.load_adapter(folder / "two", adapter_name="two")
    return theirs.eval()


@torch.no_grad()
def said(model: Any) -> Tensor:
    return model(IDS).logits


def test_each_is_computed_by_peft_and_switched_to_as_there(tmp_path: Path) -> None:
    model, fresh = two(tmp_path), llama()
    theirs = in_peft(tmp_path)
    for name in NAMES:
        ll.import_peft(fresh, tmp_path / name, name=name)
    found = []
    for name in (*NAMES, "one"):
        theirs.set_adapter(name)
        for own in (model, fresh):
            ll.set_active(own, name)
            torch.testing.assert_close(said(own), said(theirs), rtol=1e-5, atol=1e-5)
        found.append(said(model))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert torch.equal(found[0], found[2])


MODELS: dict[str, tuple[Any, list[str], Tensor]] = {
    "linear layers": (llama, ["q_proj", "v_proj"], IDS),
    "an embedding": (llama, ["embed_tokens", "q_proj"], IDS),
    "convolutions": (
        lambda: seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 2))),
        ["0", "2"],
        torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)),
    ),
}
"""How to build a model, what is adapted, and an input."""


def result(model: Any, x: Tensor) -> Tensor:
    output = model(x)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
@pytest.mark.parametrize("case", MODELS)
def test_both_at_once_are_what_peft_computes_trains_and_merges(case: str, order: Any, tmp_path: Path) -> None:
    """Each is applied to what those before it give, with the lengths of the rows that the base weight has."""
    build, targets, x = MODELS[case]
    theirs = peft.get_peft_model(build(), settings(targets, 2), adapter_name="one")
    theirs.add_adapter("two", settings(targets, 3))
    theirs.base_model.set_adapter(list(NAMES))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    own = build()
    for name in NAMES:
        ll.import_peft(own, tmp_path / name, name=name)
    theirs.base_model.set_adapter(list(order))
    ll.set_active(own, list(order))
    ll.set_trainable(own, list(order))
    expected, found = result(theirs.eval(), x), result(own.eval(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    compared = 0
    for path, layer in ll.iter_adapters(own):
        other = theirs.base_model.model.get_submodule(path)
        for name in NAMES:
            pairs = [(layer.adapter(name).magnitude, other.lora_magnitude_vector[name].weight)]
            if hasattr(other, "lora_B") and name in other.lora_B:
                pairs.append((layer.adapter(name).lora_B, other.lora_B[name].weight))
            for mine, its in pairs:
                compared += 1
                torch.testing.assert_close(mine.grad.flatten(), its.grad.flatten(), rtol=1e-4, atol=1e-4)
    assert compared >= 4 * len(targets) - 2
    ll.merge(own)
    torch.testing.assert_close(result(own, x), found, rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload(adapter_names=list(order))
    torch.testing.assert_close(result(own, x), result(merged, x), rtol=1e-4, atol=1e-5)


def test_in_another_order_both_are_another_function(tmp_path: Path) -> None:
    model, found = two(tmp_path), []
    for order in (NAMES, NAMES[::-1]):
        ll.set_active(model, list(order))
        found.append(said(model))
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_what_both_learned_under_dropout_is_what_they_evaluate(tmp_path: Path) -> None:
    """peft trains c1 (W + D1) + c2 (W + D2) - W there, and evaluates c2 (c1 (W + D1) + D2)."""
    model, theirs = two(tmp_path), in_peft(tmp_path)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    theirs.base_model.set_adapter(list(NAMES))
    ll.set_active(model, list(NAMES))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    own = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        evaluated = layer(x)
        torch.testing.assert_close(own(x), evaluated, rtol=1e-5, atol=1e-5)
        for name in NAMES:
            layer.lora_dropout[name] = nn.Dropout(1e-12)
            own.adapter(name).dropout = 1e-12
        torch.testing.assert_close(own.train()(x), evaluated, rtol=1e-5, atol=1e-5)
        assert float((layer.train()(x) - evaluated).abs().max()) > 0.05 * float(evaluated.abs().max())


def test_with_an_adapter_of_another_kind_one_of_them_is_active(tmp_path: Path) -> None:
    model = two(tmp_path)
    ll.inject(model, LoRA(rank=2), ["q_proj"], also_train=(), name="three")
    with pytest.raises(AdapterStateError, match=r"one .*three .*cannot be active together.* Activate one of them"):
        ll.set_active(model, ["one", "three"])
    ll.set_active(model, "one")
    in_file = in_peft(tmp_path)
    in_file.set_adapter("one")
    torch.testing.assert_close(said(model), said(in_file), rtol=1e-5, atol=1e-5)
