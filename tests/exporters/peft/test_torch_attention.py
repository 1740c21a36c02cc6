"""Files of peft that adapt nn.MultiheadAttention compute here what they compute in peft, and the other way."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import PEFT_WARNINGS, DoRA, LoRA, randomise, seeded
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.preview import refusals
from lora_lightning.testing import perturb

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


# -- written -----------------------------------------------------------------------------------------------------------

WRITTEN: dict[str, dict[str, Any]] = {
    "both": {"targets": ["in_proj_weight", "out_proj"]},
    "beside a layer": {"targets": ["in_proj_weight", "out_proj", "out"]},
    "the output projection alone": {"targets": ["out_proj"]},
    "the in-projection alone": {"targets": ["in_proj_weight"]},
    "of several ranks": {
        "targets": ["in_proj_weight", "out_proj", "out"],
        "overrides": {"out_proj": {"rank": 3, "alpha": 5}},
    },
}


@pytest.mark.parametrize("has_peft", [True, False])
@pytest.mark.parametrize("case", WRITTEN)
def test_peft_computes_what_was_trained_here(
    case: str, has_peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, base = model(), model()(X)
    ll.inject(trained, LoRA(rank=2), seed=0, **WRITTEN[case])
    for _, layer in ll.iter_adapters(trained):
        perturb(layer.adapters, size=0.2)
    expected = trained(X).detach()
    if not has_peft:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    report = ll.export(trained, tmp_path)
    who = "peft 0.21.2" if has_peft else "peft's rules"
    assert report.verified_by == f"{who}, each layer's merged weight alike"
    assert torch.equal(trained(X), expected)
    found = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    torch.testing.assert_close(found(X), expected, rtol=1e-4, atol=1e-5)
    again = model()
    ll.import_peft(again, tmp_path)
    torch.testing.assert_close(again(X), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-3)


@pytest.mark.parametrize("method", [DoRA(rank=2), LoRA(rank=2, bias=True)], ids=["DoRA", "bias"])
def test_more_than_factors_is_refused_before_training_with_a_way_out(method: Any, tmp_path: Path) -> None:
    trained = model()
    ll.inject(trained, method, ["out_proj", "out"], seed=0)
    said = refusals(trained)["peft"]
    assert re.search(r"nn.MultiheadAttention.* [Ee]xclude it, or use format", said)
    with pytest.raises(ExportError, match=re.escape(said)):
        ll.export(trained, tmp_path / "refused")
    ll.eject(trained)
    ll.inject(trained, method, ["out_proj", "out"], exclude=["mha"], seed=0)
    assert "peft" not in refusals(trained)
    ll.export(trained, tmp_path / "out")
