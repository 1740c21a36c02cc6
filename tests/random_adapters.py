"""Adapters with random updates, large enough for other answers than the base model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lora_lightning as ll
from ll_lora import LoRA


def two_random_adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders named one and two."""
    found = []
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(base)
        ll.inject(model, LoRA(rank=4), seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for _, layer in ll.iter_adapters(model):
                layer.adapter("default").lora_B.normal_()
        found.append(ll.save_adapter(model, tmp_path_factory.mktemp("adapters") / name))
    return found
