"""The base model beside the adapted one: the same function as before, without another copy of its weights."""

from __future__ import annotations

import pytest
import torch
from model_classes import model_class
from peft_models import DoRA, LoRA, llama, randomise
from torch import nn

import lora_lightning as ll
from lora_lightning.exporters import source as sources
from lora_lightning.exporters.peft.plain_copy import plain_copy
from lora_lightning.models.new_tokens import Vocabulary, add_rows, vocabulary

IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [LoRA(rank=2, bias=True), DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_it_is_the_base_model(method: ll.Method, tied: bool, merged: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    ll.inject(model, method)
    randomise(model)
    if merged:
        ll.merge(model)
    with plain_copy(sources.find(model, "default"), []) as plain:
        assert not list(ll.iter_adapters(plain))
        own = plain.state_dict()
        assert own.keys() == base.keys()
        assert all(torch.equal(own[key], base[key]) for key in own)
        assert torch.equal(plain(IDS).logits, llama(tie_word_embeddings=tied)(IDS).logits)
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
        if not merged:
            shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
            assert all(tensor.data_ptr() in shared for tensor in own.values())


def test_what_an_export_brings_is_not_there() -> None:
    model = llama(tie_word_embeddings=True)
    add_rows(model, Vocabulary(("<a>",), 40))
    ll.inject(model, LoRA(rank=2), also_train=["norm"])
    with plain_copy(sources.find(model, "default"), ["model.norm.weight"]) as plain:
        assert plain.model.norm.weight.isnan().all()
        assert plain.lm_head.weight.isnan().any(dim=1).nonzero().tolist() == [[40]]
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        assert isinstance(plain.lm_head, nn.Linear)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.get_parameter("model.norm.weight").requires_grad


def test_room_for_new_tokens_is_what_transformers_makes_and_the_adapted_model_keeps_its_rows() -> None:
    """Marian's input embedding is one module with the holder of the matrix once it is resized."""
    model = model_class("MarianMTModel").build()
    add_rows(model, Vocabulary(("<a>",), 71))
    ll.inject(model, LoRA(rank=1), seed=0)
    rows = model.model.shared.new_rows
    resized = model_class("MarianMTModel").build()
    resized.resize_token_embeddings(72, mean_resizing=False)
    with plain_copy(sources.find(model, "default"), []) as plain:
        assert [path for path, _ in plain.named_modules()] == [path for path, _ in resized.named_modules()]
        assert plain.config.vocab_size == 72
        assert torch.equal(plain.lm_head.weight[:71], resized.lm_head.weight[:71])
    assert model.model.shared.new_rows is rows
    assert model.config.vocab_size == 72
    assert vocabulary(model) is not None
