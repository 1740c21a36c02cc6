"""What trains in full, as peft keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS, DoRA, LoRA, randomise, seeded
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft.rules import CONFIG

pytestmark = PEFT_WARNINGS
IDS = torch.arange(3, 12)[None]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return seeded(lambda: transformers.BertForSequenceClassification(config))


BIASES: dict[str, tuple[ll.Method, dict[str, Any]]] = {
    "of layers beside": (LoRA(rank=2), {"also_train": ["key.bias", "classifier"]}),
    "all of them": (LoRA(rank=2), {"also_train": [r".*(key|value|dense|LayerNorm|classifier)\.bias"]}),
    "of a head": (LoRA(rank=2), {"also_train": ["classifier.bias"]}),
    "of adapted layers too": (LoRA(rank=2, bias=True), {"also_train": [r".*LayerNorm\.bias"]}),
    "beside DoRA": (DoRA(rank=2), {"also_train": ["value.bias"]}),
}


@pytest.mark.parametrize(("method", "options"), BIASES.values(), ids=BIASES)
def test_biases_that_train_alone_travel(method: ll.Method, options: dict[str, Any], tmp_path: Path) -> None:
    model = bert()
    ll.inject(model, method, targets=["query"], **options)
    randomise(model)
    assert ll.export(model, tmp_path / "out").verified_by.startswith("peft 0.")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["bias"] == "all"
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / "out").eval()
    expected = model.eval()(IDS).logits
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    again = bert()
    if isinstance(method, LoRA):
        ll.import_peft(again, tmp_path / "out")
        torch.testing.assert_close(again.eval()(IDS).logits, expected, atol=1e-6, rtol=1e-5)


def test_other_single_parameters_are_refused(tmp_path: Path) -> None:
    model = bert()
    ll.inject(model, LoRA(rank=2), targets=["query"], also_train=["LayerNorm.weight"])
    with pytest.raises(ExportError, match=r"peft saves modules and biases, no single parameter such as \"weight\""):
        ll.export(model, tmp_path / "out")
