"""Two DoRA adapters on one layer: each travels, and is switched to, as in peft; both at once are two there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import DoRA, llama
from torch import Tensor

import lora_lightning as ll
from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import perturb

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21.2 reads a name that transformers 5.23 has renamed
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
IDS = torch.tensor([[5, 6, 7, 8]])
NAMES = ("one", "two")


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


def test_both_at_once_are_refused_since_peft_trains_another_function_than_it_evaluates(tmp_path: Path) -> None:
    """It evaluates c2 (c1 (W + D1) + D2), which hangs on the order; where inputs are dropped it trains a sum."""
    model, theirs = two(tmp_path), in_peft(tmp_path)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    W = layer.base_layer.weight.detach().double()

    def part(name: str) -> tuple[Tensor, Tensor]:
        D = layer.scaling[name] * layer.lora_B[name].weight.detach().double() @ layer.lora_A[name].weight.double()
        return D, (layer.lora_magnitude_vector[name].weight.double() / (W + D).norm(dim=1))[:, None]

    (D1, c1), (D2, c2) = map(part, NAMES)
    composed, turned, added = c2 * (c1 * (W + D1) + D2), c1 * (c2 * (W + D2) + D1), c1 * (W + D1) + c2 * (W + D2) - W
    theirs.base_model.set_adapter(list(NAMES))
    with torch.no_grad():
        evaluated = layer(x).double()
        torch.testing.assert_close(evaluated, x.double() @ composed.mT, rtol=1e-5, atol=1e-5)
        for name in NAMES:
            layer.lora_dropout[name] = torch.nn.Dropout(1e-12)
        trained = layer.train()(x).double()
        torch.testing.assert_close(trained, x.double() @ added.mT, rtol=1e-5, atol=1e-5)
    for other in (trained, x.double() @ turned.mT):
        assert float((other - evaluated).abs().max()) > 0.05 * float(evaluated.abs().max())
    with pytest.raises(AdapterStateError, match=r"one .*two .*cannot be active together.* Activate one of them"):
        ll.set_active(model, list(NAMES))
    ll.set_active(model, "two")
