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
from architectures import ARCHITECTURES
from model_classes import model_class
from peft_models import PEFT_WARNINGS, DoRA, LoRA, from_peft, llama, seeded
from torch import Tensor

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ExportError
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


ROUTED = ["Mixtral", "Qwen3Moe", "Qwen2Moe", "Olmoe"]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # peft's own
@pytest.mark.parametrize("name", ROUTED)
def test_all_linear_of_peft_adapts_routers_and_gates_narrower_than_its_rank(name: str, tmp_path: Path) -> None:
    """peft's "all-linear" takes Qwen2's gate of one output with it, and every router that is a linear layer."""
    found = model_class(f"{name}ForCausalLM")
    theirs = from_peft(found.build, tmp_path / "theirs", target_modules="all-linear", r=8)
    own = found.build()
    report = ll.import_peft(own, tmp_path / "theirs")
    assert [path for path in report.layers if path.rpartition(".mlp.")[2].startswith(("gate", "shared_expert_gate"))]
    torch.testing.assert_close(said(own), said(theirs), rtol=1e-5, atol=1e-5)
    ll.export(own, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(found.build(), tmp_path / "again").eval()
    torch.testing.assert_close(said(again), said(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "other"), [("Llama", "LLaVA"), ("LLaVA", "Llama")])
def test_a_text_models_adapter_is_refused_by_one_that_sees_and_the_other_way(
    name: str, other: str, tmp_path: Path
) -> None:
    model = trained(ARCHITECTURES[name].build(), LoRA(rank=2), ["o_proj"])
    ll.save_adapter(model, tmp_path / "own")
    ll.export(model, tmp_path / "peft")
    target = ARCHITECTURES[other].build()
    classes = [type(one).__name__ for one in (model, target)]
    with pytest.raises(AdapterFileError, match=rf"trained on {classes[0]}; this model is {classes[1]}"):
        ll.load_adapter(target, tmp_path / "own")
    nearest = r"model\.language_model\.layers" if other == "LLaVA" else r"model\.layers"
    with pytest.raises(AdapterFileError, match=rf'{classes[1]} lacks\. Did you mean "{nearest}'):
        ll.import_peft(target, tmp_path / "peft")
    assert not list(ll.iter_adapters(target))


def test_an_adapter_on_a_model_with_another_merged_for_good_needs_that_model(tmp_path: Path) -> None:
    model = trained(llama(), LoRA(rank=2), ["q_proj"])
    ll.merge(model, keep_original=False)
    ll.eject(model)
    base = copy.deepcopy(model)
    trained(model, LoRA(rank=2), ["v_proj"])
    ll.save_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="trained on other base weights"):
        ll.load_adapter(llama(), tmp_path)
    ll.load_adapter(base, tmp_path)
    assert torch.equal(said(base), said(model))
