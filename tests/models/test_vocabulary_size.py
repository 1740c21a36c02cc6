"""What follows the size of a vocabulary: biases, buffers, second embeddings; saved, loaded and merged with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_classes import VOCABULARY, model_class
from torch import Tensor, nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError, ModelError
from lora_lightning.models.new_tokens import Vocabulary, add_rows, extended_layers, remove_rows, unresized
from lora_lightning.models.vocabulary_size import following
from lora_lightning.testing import tiny_decoder
from lora_lightning.testing.toy_models import seeded

ADDED = Vocabulary(("<tool>", "<end>"), VOCABULARY)
IDS = torch.tensor([[5, VOCABULARY, 6, VOCABULARY + 1, 7, 2]])
BIASED = ["PhiForCausalLM", "GPTJForCausalLM", "ModernBertForMaskedLM", "DistilBertForMaskedLM", "ElectraForMaskedLM"]
SHARED_BIAS = ["BertForMaskedLM", "XLMRobertaForMaskedLM", "AlbertForMaskedLM", "RobertaForCausalLM"]
BUFFERED = ["BartForConditionalGeneration", "MBartForConditionalGeneration", "MarianMTModel"]
SCALED = ["InklingForCausalLM"]
LED = ["LEDForConditionalGeneration"]
MORE_BUFFERED = ["PegasusForConditionalGeneration", "BlenderbotForConditionalGeneration"]
FURTHER = [
    "Gemma4ForCausalLM",
    "ProphetNetForConditionalGeneration",
    "T5ForConditionalGeneration",
    "InklingForCausalLM",
]
ALL = [*BIASED, *SHARED_BIAS, *BUFFERED, *MORE_BUFFERED, *LED, *FURTHER, *SCALED]


def build(name: str, **settings: Any) -> nn.Module:
    found = model_class(name)
    model = found.build(found.config(**settings))
    with torch.no_grad(), seeded(1):
        for tensor in (*model.parameters(), *model.buffers()):
            if (tensor.dim() == 1 and len(tensor) == VOCABULARY) or tensor.shape == (1, VOCABULARY):
                tensor.normal_()  # biases, which start at zero
    return model


def logits(name: str, model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(**model_class(name).batch(model, ids)).logits


def grown(name: str, **options: Any) -> Any:
    """The model with two new tokens and an adapter, all that trains away from its start."""
    model: Any = build(name)
    add_rows(model, ADDED)
    ll.inject(model, LoRA(rank=2), seed=0, **options)
    with torch.no_grad(), seeded(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_transformers_resized_computes(name: str) -> None:
    """The reference is transformers' own resizing, every new row written by hand, and zero where it is a bias."""
    model, other = build(name), build(name)
    add_rows(model, ADDED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.resize_token_embeddings(VOCABULARY + 2, mean_resizing=True)
    with torch.no_grad():
        for path, layer in extended_layers(model).items():
            other.get_submodule(path).weight[VOCABULARY:] = layer.new_rows
            if layer.bias is not None:
                other.get_submodule(path).bias[VOCABULARY:] = 0
    torch.testing.assert_close(logits(name, model), logits(name, other))
    assert model.config.get_text_config().vocab_size == VOCABULARY + 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if at % 3 else ()) for at, n in enumerate(ALL)]
)
def test_they_are_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    model = grown(name)
    expected = logits(name, model)
    ll.save_adapter(model, tmp_path / "adapter")
    fresh = build(name)
    ll.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(name, fresh), expected)
    ll.export(fresh, tmp_path / "merged", format="merged")
    plain = type(fresh).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(name, plain.eval()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(name, fresh), expected), "the model is as it was"


@pytest.mark.parametrize("name", ALL)
def test_a_failed_load_gives_back_every_tensor_and_number(name: str) -> None:
    model, plain = build(name), build(name)
    add_rows(model, ADDED)
    remove_rows(model)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert model.config.to_dict() == plain.config.to_dict()
    known = IDS.clamp(max=VOCABULARY - 1)
    assert torch.equal(logits(name, model, known), logits(name, plain, known))


@pytest.mark.parametrize(
    ("tied", "trained"), [(True, "embed_tokens"), (False, "embed_tokens"), (False, "lm_head"), (True, "all")]
)
def test_embeddings_that_train_beside_new_tokens(tied: bool, trained: str, tmp_path: Path) -> None:
    """Known tokens' rows, new ones, and the adapter are one file; another base is refused all the same."""
    names = ["embed_tokens", "norm"] if trained == "all" else [trained]
    added = Vocabulary(("<tool>", "<end>"), 32)
    ids = IDS % 32 + 2

    def base() -> Any:
        return tiny_decoder(tied=tied)

    model = base()
    add_rows(model, added)
    ll.inject(model, LoRA(rank=2), targets=["q_proj"], also_train=names, seed=0)
    with torch.no_grad(), seeded(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    ll.save_adapter(model, tmp_path / "adapter")
    fresh = base()
    ll.load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
        ll.export(model, tmp_path / "merged", format="merged")
        plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    other = base()
    other.model.norm.weight.data.add_(1.0)
    other.model.layers[0].mlp.up_proj.weight.data.add_(1.0)
    with pytest.raises(AdapterFileError, match="other base weights"):
        ll.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CanineForSequenceClassification", "has no embedding with a row for each token"),
        ("IBertForMaskedLM", "has no embedding with a row for each token"),
        ("ViTForImageClassification", "has no embedding with a row for each token"),
        ("DeepseekV4ForCausalLM", r"keeps model.layers.0.mlp.gate.tid2eid \(71, 2\) for its tokens"),
        ("MobileBertForMaskedLM", r"keeps cls.predictions.dense.weight \(8, 71\) for its tokens"),
        ("CpmAntForCausalLM", r"keeps lm_head.weight \(71, 16\) for its tokens"),
        ("EsmForMaskedLM", r"keeps lm_head.bias \(71,\) for its tokens"),
        ("FSMTForConditionalGeneration", "an output layer that it does not name"),
        ("EncoderDecoderModel", "since transformers does not resize it"),
    ],
)
def test_what_has_no_place_for_new_tokens_is_refused(name: str, message: str) -> None:
    model = model_class(name).build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        add_rows(model, ADDED)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_embedding_longer_than_the_vocabulary_that_is_stated() -> None:
    model = tiny_decoder(tied=True)
    model.config.vocab_size = 30
    with pytest.raises(ModelError, match="has 32 rows for a vocab_size of 30, and nothing says what the others are"):
        add_rows(model, Vocabulary(("<tool>",), 32))


def test_nothing_is_allocated_and_the_model_is_untouched() -> None:
    model = tiny_decoder(tied=True)
    before = list(model.state_dict().items())
    found = following(model)
    assert list(found.layers) == ["model.embed_tokens", "lm_head"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("T5GemmaForTokenClassification", ("model.decoder.embed_tokens",)),
        ("xLSTMForCausalLM", ("backbone.embeddings", "lm_head")),
        ("BartForSequenceClassification", ()),
    ],
)
def test_layers_that_transformers_leaves_as_they_are_are_known(name: str, left: tuple[str, ...]) -> None:
    model = model_class(name).build()
    assert following(model).unresized == left
    add_rows(model, ADDED)
    assert unresized(model) == left
    remove_rows(model)
    assert unresized(model) == ()
