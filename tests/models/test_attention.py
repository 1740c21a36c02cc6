"""Kernels of attention are refused with the choices there are, before weights are read."""

from __future__ import annotations

import pytest
import torch
from toy_runs import decoder_folder

from ll_lora import LoRA
from lora_lightning.errors import SettingsError
from lora_lightning.models.attention import check_attention
from lora_lightning.models.loading import load_model, load_skeleton
from lora_lightning.models.tasks import find_task
from lora_lightning.testing import tiny_decoder
from lora_lightning.training.module import AdapterModule


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_what_a_llama_can_have(name, tmp_path):
    check_attention(tiny_decoder(), name)
    folder = str(decoder_folder(tmp_path / "model"))
    for load in (load_model, load_skeleton):
        assert load(folder, find_task("causal-lm"), attention=name).config._attn_implementation == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be there")
def test_flash_attention_without_its_package_is_refused():
    rule = r'^model\.attention is "flash_attention_2", which LlamaForCausalLM cannot have here: .* It can have: sdpa, '
    with pytest.raises(SettingsError, match=rule + "flex_attention, eager"):
        check_attention(tiny_decoder(), "flash_attention_2")


def test_a_class_that_has_no_such_kernel_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    net = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(SettingsError, match=r"BloomForCausalLM cannot have here: .* It can have: eager\."):
        check_attention(net, "sdpa")


def test_a_module_says_so_before_it_loads(tmp_path):
    folder = decoder_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    module = AdapterModule(str(folder), LoRA(rank=2), task="causal-lm", attention="flash_attention_2")
    with pytest.raises(SettingsError, match="It can have: sdpa, flex_attention, eager"):
        module.configure_model()
    assert any("flash_attention_2" in str(error) for error in module.refusals())
