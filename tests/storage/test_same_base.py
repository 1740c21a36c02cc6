"""Another base than that of an adapter file is refused, by what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.same_base import check_base
from lora_lightning.storage.stored import read_folder
from lora_lightning.testing import TinyMLP, tiny_encoder


def test_the_base_is_compared_in_class_names_and_weights(tmp_path: Path) -> None:
    model = TinyMLP()
    ll.inject(model, LoRA(rank=2), seed=0)
    ll.save_adapter(model, tmp_path)
    stored = read_folder(tmp_path)
    check_base(survey(TinyMLP()), stored, (), tmp_path)
    with pytest.raises(AdapterFileError, match="was trained on TinyMLP; this model is BertForSequenceClassification"):
        check_base(survey(tiny_encoder()), stored, (), tmp_path)
    other = TinyMLP()
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1.0
    with pytest.raises(AdapterFileError, match="was trained on other base weights than this model has"):
        check_base(survey(other), stored, (), tmp_path)
