"""A module without values; what is counted with one is in tests of `estimate` and of `compare`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toy_runs import encoder_folder

from ll_lora import LoRA
from lora_lightning.cli.preflight.skeleton import assemble_skeleton
from lora_lightning.cli.preflight.trace import without_values
from lora_lightning.training.module import AdapterModule


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_classes_and_rows_of_new_tokens_come_from_the_data(tmp_path, dtype):
    data = SimpleNamespace(num_labels=5, new_tokens=("<a>", "<b>"))
    module = AdapterModule(str(encoder_folder(tmp_path / "model")), LoRA(rank=2))
    with without_values() as meter:
        assemble_skeleton(module, data, meter, dtype)
        trained = module.injection.trained
        assert trained["classifier.weight"] == 5 * 16
        assert sum(count for name, count in trained.items() if "embeddings" in name) == 2 * 16
        frozen = next(p for p in module.model.parameters() if not p.requires_grad)
        assert frozen.dtype == (dtype or torch.float32)
