"""Situations that users of comparable projects reported and that no module's own tests hold."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS, DoRA, LoRA, from_peft, llama, seeded
from torch import Tensor

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.preview import refusals
from lora_lightning.testing import perturb

pytestmark = PEFT_WARNINGS
IDS = torch.tensor([[5, 6, 7, 9]])


def trained(model: Any, method: Any, targets: list[str]) -> Any:
    ll.inject(model, method, targets, seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapters, size=0.1)
    return model


@torch.no_grad()
def said(model: Any) -> Tensor:
    return model(IDS)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dora_on_conv1d_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> Any:
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        return seeded(lambda: transformers.GPT2LMHeadModel(config)).to(dtype)

    model = trained(build(), DoRA(rank=2), ["c_attn"])
    expected, again = said(model), build()
    ll.export(model, tmp_path)
    ll.import_peft(again, tmp_path)
    assert torch.equal(said(again), expected)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    ll.merge(model)
    for other in (theirs, model):
        torch.testing.assert_close(said(other), expected, rtol=0.02, atol=0.02)
    ll.unmerge(model)
    assert torch.equal(said(model), expected)


def test_layers_of_mamba_are_merged_and_refused_by_name_for_peft(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = trained(seeded(lambda: transformers.MambaForCausalLM(config)), LoRA(rank=2), ["dt_proj", "out_proj"])
    expected = said(model)
    with pytest.raises(ExportError, match=r"dt_proj cannot travel .* Use format=\"merged\" instead"):
        ll.export(model, tmp_path / "peft")
    assert "dt_proj cannot travel" in refusals(model)["peft"]
    ll.export(model, tmp_path / "merged", format="merged")
    plain = transformers.MambaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(said(plain), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [None, ["LayerNorm"]])
def test_features_of_an_encoder_with_norms_saved_too(saved: Any, tmp_path: Path) -> None:
    def build() -> Any:
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        return seeded(lambda: transformers.BertModel(config))

    theirs = from_peft(build, tmp_path, task_type="FEATURE_EXTRACTION", target_modules=["query"], modules_to_save=saved)
    own = build()
    ll.import_peft(own, tmp_path)
    torch.testing.assert_close(said(own), said(theirs), rtol=1e-5, atol=1e-5)


def test_a_copy_a_pickle_and_a_state_dictionary_are_the_model_and_a_copy_is_apart() -> None:
    model = trained(llama(), LoRA(rank=2), ["q_proj", "v_proj"])
    expected, fresh, twin = said(model), llama(), copy.deepcopy(model)
    ll.inject(fresh, LoRA(rank=2), ["q_proj", "v_proj"])
    fresh.load_state_dict(model.state_dict())
    for other in (twin, pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(said(other), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(said(model), expected)
    assert not torch.equal(said(twin), expected)
