"""Single weights of a folder: names with and without the backbone's, several files, turned ones, missing ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lora_lightning.errors import ModelError
from lora_lightning.models.weight_files import WeightFiles


@pytest.fixture
def folder(tmp_path):
    save_file({"layers.0.q.weight": torch.ones(3, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"model.layers.1.q.weight": 2 * torch.ones(2, 3)}, tmp_path / "model-00002-of-00002.safetensors")
    return str(tmp_path)


def test_a_weight_by_its_layers_path_with_and_without_the_backbones_name(folder):
    files = WeightFiles(folder, "x.weights")
    assert torch.equal(files.weight("model.layers.0.q", torch.Size([3, 2])), torch.ones(3, 2))
    assert torch.equal(files.weight("layers.1.q", torch.Size([3, 2])), 2 * torch.ones(3, 2))  # stored turned


def test_what_is_missing_is_named(folder, tmp_path):
    files = WeightFiles(folder, "x.weights")
    with pytest.raises(ModelError, match=r'x\.weights: no file in ".*" has the weight of layers\.2\.q\. Did you mean'):
        files.weight("layers.2.q", torch.Size([3, 2]))
    with pytest.raises(ModelError, match=r"layers\.0\.q\.weight is \(3, 2\), and the layer's weight \(5, 2\)"):
        files.weight("layers.0.q", torch.Size([5, 2]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"it must be a folder with safetensors files, and has none"):
        WeightFiles(str(tmp_path / "empty"), "x.weights")
