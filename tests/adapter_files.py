"""Adapter folders of a TinyMLP, changed as another program might, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError
from lora_lightning.injection.records import adapters_named
from lora_lightning.storage.atomic import as_json
from lora_lightning.storage.sealed import seal
from lora_lightning.storage.stored import DESCRIPTION, FILE
from lora_lightning.testing import TinyMLP, perturb

METHOD = LoRA(rank=2, alpha=4.0)


TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])


X = torch.linspace(-1, 1, 18).view(3, 6)


def adapted(model: Any = None, method: LoRA = METHOD, name: str = "default", **options: Any) -> Any:
    model = TinyMLP() if model is None else model
    ll.inject(model, method, name=name, seed=0, **options)
    for i, adapter in enumerate(adapters_named(model, name).values()):
        perturb(adapter, i)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change description or tensors of an adapter folder as another version might have written them."""
    tensors = load_file(folder / FILE)
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description, tensors)
    files = {f"tokenizer/{path.name}": path.read_bytes() for path in (folder / "tokenizer").glob("*")}
    (folder / FILE).write_bytes(seal(tensors, description, files))
    (folder / DESCRIPTION).write_bytes(as_json(description))


def refused(
    model: nn.Module, folder: Path, message: str, name: str = "default", error: type[Exception] = AdapterFileError
) -> None:
    """Loading raises, and the model is what it was: structure, tensors and what trains."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(error, match=message):
        ll.load_adapter(model, folder, name)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trains
