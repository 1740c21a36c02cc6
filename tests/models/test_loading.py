"""Loading is strict: what a file lacks is named, unless it is a head or trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lightning.errors import ModelError
from lora_lightning.models.loading import kept_plain, load_model, load_skeleton, load_without_values, zero_absent
from lora_lightning.models.meta import values_follow
from lora_lightning.models.quantized_loading import Loading
from lora_lightning.models.tasks import find_task
from lora_lightning.testing import tiny_decoder, tiny_encoder

TASK = find_task("sequence-classification")
KEY = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def without(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_weights_are_those_of_the_file_and_a_head_may_have_another_size(encoder: Path) -> None:
    model = load_model(str(encoder), TASK, 5)
    assert torch.equal(model.get_parameter(KEY), tiny_encoder().get_parameter(KEY))
    assert model.get_parameter("classifier.weight").shape == (5, 16)


def test_a_backbone_weight_that_is_missing_is_named_unless_it_trains(encoder: Path) -> None:
    without(encoder, KEY)
    with pytest.raises(ModelError, match=f"lacks 1 weights of BertForSequenceClassification, such as {KEY}"):
        load_model(str(encoder), TASK, 3)
    load_model(str(encoder), TASK, 3, also_train=["layer.0.output.dense"])


def test_a_skeleton_reads_no_weights(encoder: Path) -> None:
    (encoder / "model.safetensors").unlink()
    assert load_skeleton(str(encoder), TASK, 3).get_parameter(KEY).shape == (16, 24)
    bare = load_without_values(str(encoder), TASK, 3)
    assert bare.get_parameter(KEY).is_meta
    assert values_follow(bare)
    with pytest.raises(ModelError, match='the base model is to be "nf4", and without its weights'):
        load_skeleton(str(encoder), TASK, 3, quantize=Loading("nf4"))


def test_heads_outputs_and_what_trains_are_not_quantized() -> None:
    assert kept_plain(tiny_encoder()) == ["classifier", "bert.pooler"]
    assert kept_plain(tiny_decoder(), ["model.layers.0.mlp.up_proj"]) == ["lm_head", "model.layers.0.mlp.up_proj"]


def test_what_the_task_does_without_is_zero() -> None:
    model = tiny_encoder()
    assert zero_absent(model, ["bert.pooler.dense.weight", "classifier.weight"], ["pooler"]) == {
        "bert.pooler.dense.weight"
    }
    assert not model.get_parameter("bert.pooler.dense.weight").any()
    assert model.get_parameter("classifier.weight").any()
