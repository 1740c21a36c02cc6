"""An export is opened by peft, or by its rules, before it counts; what computes another model is found."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS, LoRA, change_tensors, llama, randomise, seeded
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters import source as sources
from lora_lightning.exporters.peft import verify as verifying
from lora_lightning.exporters.peft.rules import CONFIG
from lora_lightning.exporters.peft.verify import verify

pytestmark = PEFT_WARNINGS


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return seeded(lambda: transformers.BertForSequenceClassification(config))


@pytest.fixture(params=[True, False], ids=["peft", "peft's rules"])
def opened_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not request.param:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            verifying.importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a)
        )
    return "peft 0." if request.param else "peft's rules"


def adapted(build: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = build()
    ll.inject(model, LoRA(rank=2), **options)
    randomise(model)
    return model


def test_the_report_says_who_opened_it(opened_by: str, tmp_path: Path) -> None:
    report = ll.export(adapted(bert), tmp_path / "out")
    assert report.verified_by.startswith(f"{opened_by}")
    assert f"  verified by {opened_by}" in str(report)
    assert "on the base model, outputs alike up to" in report.verified_by


def test_on_a_model_of_ones_own_each_layer_is_compared(opened_by: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Conv1d(6, 4, 1), nn.Embedding(5, 3))
    ll.inject(model, LoRA(rank=2), targets=["0", "2", "3"])
    randomise(model)
    report = ll.export(model, tmp_path / "out")
    assert report.verified_by.startswith(opened_by)
    assert report.verified_by.endswith("each layer's outputs alike")


def test_on_a_model_of_ones_own_heads_are_compared_too(opened_by: str, tmp_path: Path) -> None:
    head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 6), head=head))
    ll.inject(model, LoRA(rank=2), targets=["body"], also_train=["head"])
    randomise(model)
    assert ll.export(model, tmp_path / "out").verified_by.startswith(opened_by)


def test_a_name_that_peft_saves_twice_is_found(tmp_path: Path) -> None:
    """peft puts a copy into the copy of a module whose name ends the same, and then misses its own tensors."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    ll.inject(model, LoRA(rank=2), targets=["0"], exclude=["1"], also_train=["1"])
    with pytest.raises(ExportError, match=r"peft 0\..* does not open the export: KeyError: .*1\.1\.weight"):
        ll.export(model, tmp_path / "out")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


FAULTS: dict[str, Callable[[Path], None]] = {
    "another alpha": lambda folder: change_config(folder, lora_alpha=9),
    "another scaling": lambda folder: change_config(folder, use_rslora=True),
    "one layer is not selected": lambda folder: change_config(
        folder, target_modules=["key", "value", "dense", "layer.0.attention.self.query"]
    ),
    "a head that is not saved": lambda folder: change_config(folder, task_type=None, modules_to_save=None),
    "a factor that is another": lambda folder: change_tensors(
        folder, lambda t: t[next(key for key in t if "lora_A" in key)].mul_(-1)
    ),
    "a head that is another": lambda folder: change_tensors(
        folder, lambda t: t["base_model.model.classifier.weight"].add_(1)
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_export_that_computes_another_model_is_found(
    fault: Callable[[Path], None], opened_by: str, tmp_path: Path
) -> None:
    model = adapted(bert)
    ll.export(model, tmp_path / "out", verify=False)
    fault(tmp_path / "out")
    with pytest.raises(ExportError, match=f"{opened_by}.* computes another model|misses|selects? "):
        verify(sources.find(model, "default"), tmp_path / "out", truncated=False)


def test_the_adapted_model_is_as_before(opened_by: str, tmp_path: Path) -> None:
    model = adapted(llama).train()
    ll.inject(model, LoRA(rank=2), name="second", targets=["q_proj"])
    randomise(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = ll.export(model, tmp_path / "out", name="default")
    assert report.verified_by.startswith(opened_by)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.training
    assert all(module.training for module in model.modules())
    assert {layer.active for _, layer in ll.iter_adapters(model)} == {("second",), ()}


def test_a_merged_model_is_verified_and_stays_merged(tmp_path: Path) -> None:
    model = adapted(llama)
    ll.merge(model)
    before = {name: layer.base.weight.clone() for name, layer in ll.iter_adapters(model)}
    assert ll.export(model, tmp_path / "out").verified_by
    assert all(layer.merged == ("default",) for _, layer in ll.iter_adapters(model))
    assert all(torch.equal(before[name], layer.base.weight) for name, layer in ll.iter_adapters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_in_other_dtypes(dtype: torch.dtype, opened_by: str, tmp_path: Path) -> None:
    report = ll.export(adapted(lambda: bert().to(dtype)), tmp_path / "out")
    assert report.verified_by.startswith(opened_by)


def test_a_truncated_update_is_compared_with_the_rules(tmp_path: Path) -> None:
    model = llama()
    ll.inject(model, LoRA(rank=4))
    randomise(model)
    report = ll.export(model, tmp_path / "out", rank=2)
    assert report.kind == "truncated SVD"
    assert "on the base model" in report.verified_by


class Picky(transformers.BertForSequenceClassification):
    """Takes what nobody can guess."""

    def forward(self, secret: Any) -> Any:
        return secret


def test_what_cannot_be_run_is_not_called_verified(tmp_path: Path) -> None:
    model = seeded(lambda: Picky(bert().config))
    ll.inject(model, LoRA(rank=2))
    report = ll.export(model, tmp_path / "out")
    assert "verified" not in str(report)
    assert "read back tensor by tensor, but not run: Picky could not be called with input_ids" in str(report)


def test_a_model_that_cannot_be_copied_is_exported_and_not_called_verified(tmp_path: Path) -> None:
    model = adapted(bert)
    model.lock = threading.Lock()
    report = ll.export(model, tmp_path / "out")
    assert not report.verified_by
    assert "but not run: CopyError: BertForSequenceClassification cannot be copied" in str(report)
