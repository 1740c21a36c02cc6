from __future__ import annotations

from torch import nn

from lora_lightning.models.anatomy import survey
from lora_lightning.testing import TinyMLP, tiny_decoder, tiny_encoder


def test_heads_are_what_a_task_model_has_outside_its_backbone_and_its_pooler() -> None:
    assert survey(tiny_encoder()).heads == ["classifier", "bert.pooler"]
    assert survey(tiny_encoder().bert).heads == []
    assert survey(tiny_decoder()).heads == []
    assert survey(TinyMLP()).heads == []
    assert survey(nn.ModuleDict({"net": tiny_encoder()})).heads == ["net.classifier", "net.bert.pooler"]
