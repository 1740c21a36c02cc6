"""PiSSA, OLoRA, CorDA and LoRA-GA: what peft takes out of the base weight on loading is part of the update here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS, llama, randomise, seeded
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.rules import CONFIG

pytestmark = PEFT_WARNINGS
IDS = torch.arange(3, 12)[None]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def trained(build: Any, folder: Path, start: str, **options: Any) -> Any:
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "init_lora_weights": start, "target_modules": ["q_proj"], **options}
    )
    theirs = peft.get_peft_model(build(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(folder / f"{start}_init")
    theirs.peft_config["default"].init_lora_weights = start
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "PiSSA": (llama, "pissa", {}),
    "PiSSA with two ranks": (llama, "pissa", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}}),
    "PiSSA with another scaling": (llama, "pissa", {"use_rslora": True}),
    "PiSSA by iterations": (llama, "pissa_niter_4", {}),
    "PiSSA on Conv1D": (gpt2, "pissa", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "OLoRA": (llama, "olora", {}),
    "OLoRA on wide and tall layers": (llama, "olora", {"target_modules": ["up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize(("build", "start", "options"), CASES.values(), ids=CASES)
def test_the_model_that_was_trained_comes_back(
    build: Any, start: str, options: dict[str, Any], carried: bool, tmp_path: Path
) -> None:
    theirs = trained(build, tmp_path, start, **options)
    if not carried:
        for path in (tmp_path / f"{start}_init").iterdir():
            path.unlink()
    model = build()
    if not carried and "niter" in start:
        with pytest.raises(AdapterFileError, match="its start factors are not there"):
            ll.import_peft(model, tmp_path)
        return
    report = ll.import_peft(model, tmp_path)
    torch.testing.assert_close(model.eval()(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert "the start factors, which peft takes out of the base weights, are part of it" in str(report)
    assert report.method.rank == 8
    randomise(model)  # from here on it is a LoRA like any other
    ll.export(model, tmp_path / "out")


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_starts_that_need_data_are_read_with_the_factors_beside(start: str, tmp_path: Path) -> None:
    """What these starts compute needs data; the files are those of PiSSA but for the word."""
    theirs = trained(llama, tmp_path, "pissa")
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    model = llama()
    ll.import_peft(model, tmp_path)
    torch.testing.assert_close(model.eval()(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_start_factors_that_do_not_fit(tmp_path: Path) -> None:
    trained(llama, tmp_path, "pissa")
    path = tmp_path / "pissa_init" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 7}))
    with pytest.raises(AdapterFileError, match=r"pissa_init.* has no start factors of the same shape and scaling for"):
        ll.import_peft(llama(), tmp_path)
    (tmp_path / "init2").mkdir()
    (tmp_path / "init2" / CONFIG).write_text("{}")
    with pytest.raises(AdapterFileError, match="holds init2, pissa_init; keep one with start factors"):
        ll.import_peft(llama(), tmp_path)
