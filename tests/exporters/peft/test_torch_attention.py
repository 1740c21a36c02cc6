"""Files of peft that adapt nn.MultiheadAttention compute here what they compute in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import PEFT_WARNINGS, randomise, seeded
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError

pytestmark = PEFT_WARNINGS
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha, self.out = nn.MultiheadAttention(8, 2, batch_first=True, **options), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mha(x, x, x, need_weights=False)[0])


def model(**options: Any) -> nn.Module:
    return seeded(lambda: Attention(**options)).eval()


def theirs(folder: Path, build: Any = model, **options: Any) -> nn.Module:
    found = peft.get_peft_model(build(), peft.LoraConfig(r=2, **options)).eval()
    randomise(found)
    found.save_pretrained(folder)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["mha"], "lora_alpha": 6},
        {"target_modules": ["mha", "out"], "use_rslora": True},
        {"target_modules": ["mha"], "rank_pattern": {"mha": 3}, "alpha_pattern": {"mha": 5}},
        {"target_modules": "mha", "lora_dropout": 0.5},
    ],
)
def test_it_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    found, own = theirs(tmp_path, **options), model()
    report = ll.import_peft(own, tmp_path)
    assert "mha.out_proj: the update counts twice, as peft 0.21 computes it" in report.notes
    for training in (False, True):
        own.train(training), found.train(training)
        torch.testing.assert_close(own(X), found(X), rtol=1e-5, atol=1e-5)
    expected = found.merge_and_unload()(X)
    ll.merge(own)
    torch.testing.assert_close(own(X), expected, rtol=1e-5, atol=1e-5)


def test_inside_a_block_and_without_a_bias(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"block": model(bias=False)})

    found, own = theirs(tmp_path, build, target_modules=["mha"]), build()
    ll.import_peft(own, tmp_path)
    expected = found.base_model.model["block"](X)
    torch.testing.assert_close(own["block"](X), expected, rtol=1e-5, atol=1e-5)


def test_the_factors_of_one_projection_are_not_enough(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs(tmp_path, target_modules=["mha"])
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "out_proj" not in key}, file)
    with pytest.raises(AdapterFileError, match=r"adapts mha, .*nn.MultiheadAttention: .*needs factors for both"):
        ll.import_peft(model(), tmp_path)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_that_peft_does_not_compute_with_is_refused(tmp_path: Path) -> None:
    theirs(tmp_path, target_modules=["mha"], lora_bias=True)
    with pytest.raises(AdapterFileError, match=r"has lora_bias for mha\.in_proj_weight"):
        ll.import_peft(model(), tmp_path)
