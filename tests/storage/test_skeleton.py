from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import tiny_moe
from adapter_files import TOKENS, X, adapted
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError
from lora_lightning.injection.records import records
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows, vocabulary
from lora_lightning.storage.fingerprint import keep_fingerprint, outline
from lora_lightning.storage.load import check_loads
from lora_lightning.storage.skeleton import keep_skeleton, skeleton
from lora_lightning.storage.stored import FILE, read_folder
from lora_lightning.testing import TinyMLP, tiny_decoder, tiny_encoder


class Doubled(nn.Linear):
    """A linear layer whose forward is its own, so that a trial on its weight has to show that it is linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


def with_doubled() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Doubled(6, 8), nn.Linear(8, 4))


def tied_pair() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Doubled(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def rows(model: Any) -> Any:
    add_rows(model, Vocabulary(("<a>", "<b>"), 32))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "mlp": TinyMLP,
    "encoder": tiny_encoder,
    "decoder": tiny_decoder,
    "tied": lambda: tiny_decoder(tied=True),
    "experts": tiny_moe,
    "forward of its own": with_doubled,
    "shared weight": tied_pair,
    "no bias": lambda: nn.Sequential(nn.Linear(6, 4, bias=False)),
    "compiled block": lambda: nn.Sequential(torch.compile(TinyMLP(), backend="eager")),
}
METHODS = {"lora": LoRA(rank=2), "bias": LoRA(rank=2, bias=True)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_the_plain_model_is(method: str, merged: bool, kind: str) -> None:
    """Names, shapes and types of parameters and buffers, layers that take adapters, the fingerprint's outline."""
    plain, model = MODELS[kind](), MODELS[kind]()
    if kind == "experts" and method == "bias":
        return
    targets = ["0"] if kind == "shared weight" else "all-linear"
    report = ll.inject(model, METHODS[method], targets)
    if merged and not any(layer.tied_to for _, layer in ll.iter_adapters(model)):
        ll.merge(model)
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    made = skeleton(survey(model))
    own, theirs = survey(made), survey(plain)
    assert {k: (v.shape, v.dtype) for k, v in made.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in plain.state_dict().items()
    }
    assert list(own.parameters) == list(theirs.parameters)
    assert {path: type(module) for path, module in own.modules.items()} == {
        path: type(module) for path, module in theirs.modules.items()
    }
    assert own.adaptable.keys() == theirs.adaptable.keys() >= set(report.layers)
    assert outline(own) == outline(theirs)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(
        after[key].data_ptr() == place and torch.equal(after[key], value) for key, (place, value) in before.items()
    )


def test_nothing_of_the_model_changes_with_it() -> None:
    model = adapted(rows(tiny_decoder()), targets=["q_proj"])
    logits, size = model(TOKENS).logits, model.config.vocab_size
    made: Any = skeleton(survey(model))
    assert vocabulary(made) is None
    assert not survey(made).extended
    add_rows(made, Vocabulary(("<a>", "<b>", "<c>"), 32))
    made.config.hidden_size = 1
    made.extra = nn.Linear(1, 1)
    assert (model.config.vocab_size, model.config.hidden_size) == (size, 16)
    assert "extra" not in dict(model.named_modules())
    assert vocabulary(model).tokens == ("<a>", "<b>")
    assert torch.equal(model(TOKENS).logits, logits)


def test_it_holds_no_memory() -> None:
    made = skeleton(survey(adapted()))
    assert all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
    with pytest.raises((NotImplementedError, RuntimeError)):
        made(X)


def test_a_model_whose_weights_lie_flat_is_tried_on_the_skeleton_that_was_kept(tmp_path: Path) -> None:
    """As under FSDP1, which puts the weights of a block into one flat parameter."""
    model = adapted(rows(tiny_decoder()), targets=["q_proj"])
    trained = ll.save_adapter(model, tmp_path / "before")
    keep_skeleton(model)
    keep_fingerprint(model, [name for record in records(model).values() for name in record.trained])
    for name, parameter in list(model.named_parameters()):
        if not parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.detach().flatten(), requires_grad=False))
    ll.save_adapter(model, tmp_path / "after")
    assert (trained / FILE).read_bytes() == (tmp_path / "after" / FILE).read_bytes()
    stored = read_folder(tmp_path / "after")
    for wrong, message in (
        (
            dataclasses.replace(stored, layers={**stored.layers, "model.layers.0.lost": {}}),
            "lost, which this model lacks",
        ),
        (dataclasses.replace(stored, fingerprint={**stored.fingerprint, "names": "0"}), "other names or shapes"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            check_loads(survey(model), wrong, tmp_path)
    fresh = tiny_decoder()
    ll.load_adapter(fresh, tmp_path / "after")
