"""What of a task model is its head: it is outside the pretrained part, whether the class says where that is or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_classes import model_class
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.models.anatomy import survey
from lora_lightning.models.loading import load_model
from lora_lightning.models.tasks import find_task
from lora_lightning.testing import TinyMLP, tiny_decoder, tiny_encoder

UNNAMED = {
    "CLIPForImageClassification": ["classifier"],
    "SiglipForImageClassification": ["classifier"],
    "Siglip2ForImageClassification": ["classifier"],
    "MetaClip2ForImageClassification": ["classifier"],
    "HGNetV2ForImageClassification": ["fc"],
    "PPLCNetForImageClassification": ["head"],
    "PerceiverForSequenceClassification": ["perceiver.decoder"],
    "PerceiverForImageClassificationLearned": ["perceiver.decoder"],
}
"""Classes whose `base_model_prefix` is none of their attributes, or that keep the head inside the backbone."""
CONVOLUTIONS = "convolution"


def test_heads_are_what_a_task_model_has_outside_its_backbone_and_its_pooler() -> None:
    assert survey(tiny_encoder()).heads == ["classifier", "bert.pooler"]
    assert survey(tiny_encoder().bert).heads == []
    assert survey(tiny_decoder()).heads == []
    assert survey(TinyMLP()).heads == []
    assert survey(nn.ModuleDict({"net": tiny_encoder()})).heads == ["net.classifier", "net.bert.pooler"]


@pytest.mark.parametrize(("name", "heads"), UNNAMED.items())
def test_a_fresh_classifier_is_a_head_whatever_the_class_calls_its_backbone(
    name: str, heads: list[str], tmp_path: Path
) -> None:
    """It trains, is not adapted, is saved, and comes back in a model with another fresh one."""
    found = model_class(name)

    def base(seed: int) -> Any:
        model = found.build()
        torch.manual_seed(seed)
        for head in heads:
            for parameter in model.get_submodule(head).parameters():
                nn.init.normal_(parameter, std=0.1)
        return model

    model = base(1)
    assert survey(model).heads == heads
    nets = ("HGNetV2ForImageClassification", "PPLCNetForImageClassification")  # of convolutions alone
    report = ll.inject(model, LoRA(rank=1), [CONVOLUTIONS] if name in nets else "all-linear", seed=0)
    inside = [key for key, _ in base(1).named_parameters() if key.startswith(tuple(f"{head}." for head in heads))]
    assert list(report.trained) == inside
    assert not [path for path in report.layers if path.startswith(tuple(heads))]
    ll.save_adapter(model, tmp_path / "adapter")
    other = base(2)
    ll.load_adapter(other, tmp_path / "adapter")
    assert all(torch.equal(other.get_parameter(key), model.get_parameter(key)) for key in inside)


@pytest.mark.parametrize(
    "name",
    ["CLIPModel", "CLIPVisionModel", "SiglipModel", "BertModel"],
)
def test_pretrained_models_without_labels_have_no_head(name: str) -> None:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        assert survey(cls(cls.config_class())).heads == []


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "SiglipForImageClassification"])
def test_the_command_line_loads_it_with_a_fresh_classifier(name: str, tmp_path: Path) -> None:
    """The folder holds the whole pretrained model, so the head is all that is missing."""
    found = model_class(name)
    found.build().save_pretrained(tmp_path)
    model: Any = load_model(str(tmp_path), find_task("image-classification"), num_labels=5)
    assert model.classifier.weight.shape[0] == 5


def test_weights_of_a_task_model_itself_train_with_its_head() -> None:
    """A weighted sum over layers is a parameter of the model, and fresh like its classifier."""
    found = model_class("Wav2Vec2ForSequenceClassification")
    model = found.build(found.config(use_weighted_layer_sum=True))
    assert survey(model).heads == ["projector", "classifier", "layer_weights"]
    report = ll.inject(model, LoRA(rank=2), seed=0)
    assert "layer_weights" in report.trained
