from __future__ import annotations

import pytest
from adapted_models import METHOD
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import TargetError
from lora_lightning.injection.also_train import trained_parameters
from lora_lightning.models.anatomy import survey
from lora_lightning.testing import tiny_encoder


def test_also_train_takes_names() -> None:
    model = tiny_encoder()
    assert trained_parameters(survey(model), "heads") == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    assert trained_parameters(survey(model), ["classifier"]) == trained_parameters(survey(model), "classifier")
    assert trained_parameters(survey(model), ["classifier.bias"]) == ["classifier.bias"]
    assert trained_parameters(survey(model), []) == []


def test_a_tied_parameter_trains_by_its_first_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert trained_parameters(survey(model), ["embed"]) == ["embed.weight"]
    text = r'also_train: "head" matches head.weight, which is embed.weight as well; name that one to train both'
    with pytest.raises(TargetError, match=text):
        trained_parameters(survey(model), ["head"])


def test_also_train_does_not_reach_into_adapted_layers() -> None:
    model = tiny_encoder()
    ll.inject(model, METHOD, ["query"], also_train=())
    with pytest.raises(TargetError, match='"query" matches no parameter outside adapted layers'):
        trained_parameters(survey(model), ["query"])
