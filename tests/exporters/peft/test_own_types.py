"""Folders of peft in a type of a method's own, both ways: peft's PEANUT."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lightning as ll
from ll_neat import NEAT
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.errors import AdapterFileError, ExportError, SettingsError
from lora_lightning.exporters.peft.own_types import types
from lora_lightning.testing import perturb, tiny_encoder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call

METHOD = NEAT(rank=3, depth=1, scaling=0.5, activation="gelu")
TOKENS = torch.tensor([[1, 5, 7, 2]])


def trained(method=METHOD, **options):
    model = tiny_encoder()
    ll.inject(model, method, ["query", "value"], seed=0, **options)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def theirs(folder, depth=1, **options):
    """A folder that peft has made and saved, and its model."""
    config = peft.PeanutConfig(
        r=3, depth=depth, scaling=0.5, act_fn="gelu", target_modules=["query", "value"], **options
    )
    model = peft.get_peft_model(tiny_encoder(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "peanut_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return model


def change(folder, tensors=lambda found: None, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    found = load_file(folder / "adapter_model.safetensors")
    tensors(found)
    save_file(found, folder / "adapter_model.safetensors")


def test_the_installed_types():
    assert types() == {"PEANUT": NEAT}


@pytest.mark.parametrize("depth", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_what_is_written_is_read_by_peft_and_by_us(depth, tmp_path):
    model = trained(NEAT(rank=3, depth=depth, scaling=0.5, activation="gelu"))
    report = ll.export(model, tmp_path / "out")
    assert report.kind == "native"
    assert "peft" in report.verified_by
    opened = peft.PeftModel.from_pretrained(tiny_encoder(), tmp_path / "out")
    assert opened.peft_config["default"].peft_type == "PEANUT"
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-5, atol=1e-5)
    again = tiny_encoder()
    read = ll.import_peft(again, tmp_path / "out")
    assert read.method == NEAT(rank=3, depth=depth, scaling=0.5, activation="gelu")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("depth", [0, 2])
def test_what_peft_writes_is_read(depth, tmp_path):
    model = theirs(tmp_path, depth)
    own = tiny_encoder()
    report = ll.import_peft(own, tmp_path)
    assert report.method == NEAT(rank=3, depth=depth, scaling=0.5, activation="gelu")
    torch.testing.assert_close(logits(own), logits(model), rtol=1e-5, atol=1e-5)
    assert all(layer.adapter("default").reader.requires_grad for _, layer in ll.iter_adapters(own))


@pytest.mark.slow
def test_a_head_travels_both_ways(tmp_path):
    model = theirs(tmp_path / "theirs", modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "theirs")
    own = tiny_encoder()
    ll.import_peft(own, tmp_path / "theirs")
    torch.testing.assert_close(logits(own), logits(model), rtol=1e-5, atol=1e-5)
    assert own.classifier.weight.requires_grad
    ll.export(own, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(tiny_encoder(), tmp_path / "ours")
    torch.testing.assert_close(logits(opened), logits(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "message"),
    [
        (lambda t: None, {"act_fn": "mish"}, SettingsError, r'NEAT.activation is "mish"'),
        (lambda t: None, {"new_option": 3}, AdapterFileError, "uses new_option, which NEAT does not read"),
        (lambda t: t.pop(sorted(t)[0]), {}, AdapterFileError, "lacks the tensors of bert.encoder.layer.0.*promises"),
        (lambda t: None, {"r": 4}, AdapterFileError, r"has shape \(3, 16\); the layer needs \(4, 16\)"),
        (lambda t: None, {"target_modules": ["query", "value", "key"]}, AdapterFileError, "lacks the tensors of .*key"),
        (lambda t: t.update({"x.weight": torch.ones(1)}), {}, AdapterFileError, "x.weight is no name that save_pretr"),
        (
            lambda t: t.update({"base_model.model.none.weight": torch.ones(1)}),
            {},
            AdapterFileError,
            "carries none.weight, which BertForSequenceClassification lacks",
        ),
    ],
    ids=["activation", "option", "tensor", "rank", "layer", "name", "foreign"],
)
def test_a_folder_that_does_not_fit_is_refused_and_the_model_stays(tensors, settings, error, message, tmp_path):
    theirs(tmp_path)
    change(tmp_path, tensors, **settings)
    model = tiny_encoder()
    before = logits(model)
    with pytest.raises(error, match=message):
        ll.import_peft(model, tmp_path)
    assert not list(ll.iter_adapters(model))
    assert torch.equal(logits(model), before)


def test_layers_with_settings_of_their_own_are_no_peanut(tmp_path):
    with pytest.raises(ExportError, match=r"rank differs between layers .* peft's PEANUT has one r for all"):
        ll.export(trained(overrides={"layer.1": {"rank": 2}}), tmp_path / "out")


def test_folded_updates_and_other_layers_have_no_place(tmp_path):
    model = trained()
    for _, layer in ll.iter_adapters(model):
        layer.set_folded("default", DenseUpdate(layer.base_layer))
        layer.fold("default")
    with pytest.raises(ExportError, match="cannot travel as PEANUT: peft's PEANUT has no place for the updates of ear"):
        ll.export(model, tmp_path / "out")
    model = nn.Sequential(Conv1D(5, 6))
    ll.inject(model, METHOD, ["0"], also_train=())
    with pytest.raises(ExportError, match=r"it is a Conv1D, and peft's PEANUT is of nn.Linear alone"):
        ll.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_with_a_rank_it_is_a_truncated_lora(tmp_path):
    report = ll.export(trained(NEAT(rank=3)), tmp_path / "out", rank=3)
    assert report.kind == "truncated SVD" or all(share < 1e-9 for share in report.discarded.values())
    again = tiny_encoder()
    assert type(ll.import_peft(again, tmp_path / "out").method).__name__ == "LoRA"
    torch.testing.assert_close(logits(again), logits(trained(NEAT(rank=3))), rtol=1e-4, atol=1e-5)
