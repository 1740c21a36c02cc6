"""The reader by peft's rules; it is compared with peft in test_interop.py, on every case there."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS, LoRA, from_peft, llama, randomise, seeded
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft.apply import apply_folder
from lora_lightning.exporters.peft.experts import find_stacks
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows

pytestmark = PEFT_WARNINGS
IDS = torch.tensor([[5, 41, 40, 9]])


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=42, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def test_fused_experts(tmp_path: Path) -> None:
    model = mixtral()
    ll.inject(model, LoRA(rank=2))
    randomise(model)
    ll.export(model, tmp_path / "out", verify=False)
    plain = mixtral()
    apply_folder(peft_file.read(tmp_path / "out", find_stacks(survey(plain).layers)), plain)
    torch.testing.assert_close(plain(IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_layer", [False, True])
def test_rows_of_tokens(tied: bool, by_layer: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = llama(tie_word_embeddings=tied)
        model.resize_token_embeddings(42, mean_resizing=False)
        return seeded(lambda: model)

    model = llama(tie_word_embeddings=tied)
    add_rows(model, Vocabulary(("<a>", "<b>"), 40))
    ll.inject(model, LoRA(rank=2), targets=["q_proj"])
    randomise(model)
    ll.export(model, tmp_path / "out", verify=False)
    torch.manual_seed(0)
    opened = peft.PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    plain = build()
    folder = peft_file.read(tmp_path / "out", {})
    if by_layer:
        stated = folder.config["trainable_token_indices"]
        stated = stated if isinstance(stated, dict) else {"embed_tokens": stated}
        folder.config["trainable_token_indices"] = stated
    apply_folder(folder, plain)
    torch.testing.assert_close(plain(IDS).logits, opened(IDS).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


def test_layers_and_factors_that_do_not_fit(tmp_path: Path) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj", "v_proj"])
    folder = peft_file.read(tmp_path, {})
    layer = folder.layers.pop("model.layers.0.self_attn.q_proj")
    with pytest.raises(
        ExportError, match=r"selects model\.layers\.0\.self_attn\.q_proj, for which there are no factors"
    ):
        apply_folder(folder, llama())
    folder.layers["model.layers.0.self_attn.q_proj"] = layer
    folder.config["target_modules"] = ["q_proj"]
    with pytest.raises(ExportError, match=r"does not select model\.layers\.[01]\.self_attn\.v_proj"):
        apply_folder(folder, llama())
