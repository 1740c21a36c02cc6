from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import Q, change_tensors, from_peft, llama
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, SettingsError
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.folder import read

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21.2 reads a name that transformers 5.23 has renamed
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # peft takes its own one-dimensional lora_B.bias for a sharded factor
    "ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape. .*lora_B.bias:peft.utils.warning.PeftWarning",
)


def test_peft_divides_by_the_length_of_a_row() -> None:
    """Why a row of zeros is refused; when this fails, the refusal in peft_factors can go."""
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight[1])
    theirs = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"], use_dora=True))
    assert theirs(torch.ones(1, 4)).isnan().tolist() == [[False, True, False]]


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


TOP = "base_model.model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("base_model.model.", "model."), 'Did you mean "model.layers.0.self_attn.q_proj"'),
        (rename("1.self_attn.q_proj", "1.self_attn.q_porj"), 'Did you mean "model.layers.1.self_attn.q_proj"'),
        (rename("self_attn.q_proj", "self_attn"), "a LlamaAttention, which takes no adapter"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "holds A only, no pair"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(8, 4)}), r"the layer needs \(\(4, 16\), \(16, 4\)\)"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(16)}), "has a lora_magnitude_vector, while"),
        (lambda t: t.update({f"{Q}.lora_ga_scale": torch.zeros(16)}), "belongs to a variant"),
        (lambda t: t.update({f"{Q}.base_layer.weight": torch.zeros(16, 16)}), "differs from the model's own"),
        (lambda t: t.update({f"{TOP}.lm_hed.weight": torch.zeros(40, 16)}), 'Did you mean "lm_head.weight"'),
        (lambda t: t.update({f"{TOP}.lm_head.weight": torch.zeros(40, 16)}), "in no module that modules_to_save"),
        (lambda t: t.update({f"{TOP}.lm_head.weight": torch.zeros(1, 16)}), "the model needs"),
        (lambda t: t.clear(), "holds no factor pair"),
        (
            lambda t: t[f"{Q}.lora_A.weight"][0].fill_(torch.nan),
            r"tensor .*0\.self_attn\.q_proj\.lora_A\.weight holds NaN",
        ),
        (lambda t: t[f"{Q}.lora_B.weight"][1, 1].fill_(-torch.inf), r"q_proj\.lora_B\.weight holds NaN or infinity"),
    ],
)
def test_refused_tensors(saved: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    change_tensors(saved, change)
    model = llama()
    with pytest.raises(AdapterFileError, match=message):
        ll.import_peft(model, saved)
    assert not list(ll.iter_adapters(model))


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    from_peft(llama, tmp_path, target_modules=["q_proj"])
    (tmp_path / peft_rules.TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="a pickle, which can run any code and is not opened"):
        ll.import_peft(llama(), tmp_path)


def test_without_values_a_folder_has_its_shapes_and_types(saved: Path) -> None:
    whole, outline = read(saved, {}), read(saved, {}, values=False)
    assert whole.layers.keys() == outline.layers.keys()
    for path, layer in whole.layers.items():
        other = outline.layers[path]
        assert (layer.A.shape, layer.B.shape, layer.scaling) == (other.A.shape, other.B.shape, other.scaling)
        assert (layer.A.dtype, layer.B.dtype) == (other.A.dtype, other.B.dtype)
    assert {key: value.shape for key, value in whole.heads.items()} == {k: v.shape for k, v in outline.heads.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alpha": "16"}, r"lora_alpha='16'; it must be a finite number"),
        ({"lora_alpha": None}, r"lora_alpha=None; it must be a finite number"),
        ({"lora_alpha": float("inf")}, r"lora_alpha=inf; it must be a finite number"),
        ({"lora_dropout": "0.1"}, r"lora_dropout='0.1'; it must be a finite number"),
        ({"r": 4.0}, r"r=4.0; it must be a whole number"),
        ({"use_rslora": "false"}, r"use_rslora='false'; it must be true or false"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\]; it must be numbers by name"),
        ({"target_modules": {"q_proj": 1}}, r"it must be a list of names, or an expression"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head'; it must be a list of names"),
        ({"layers_to_transform": "1"}, r"layers_to_transform='1'; it must be a list of block numbers, or one"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, r"LoRA\.alpha is inf; it must be a finite number"),
    ],
)
def test_settings_that_peft_does_not_write(values: dict[str, Any], message: str, saved: Path) -> None:
    """A text where a number is meant is true in Python, and infinity gives no numbers."""
    path = saved / peft_rules.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    model = llama()
    with pytest.raises((AdapterFileError, SettingsError), match=message):
        ll.import_peft(model, saved)
    assert not list(ll.iter_adapters(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn], ids=str)
def test_factors_of_any_floating_type_are_read_exactly(dtype: torch.dtype, saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    model, stated = llama(), load_file(saved / peft_rules.TENSORS)
    ll.import_peft(model, saved)
    for path, layer in ll.iter_adapters(model):
        for side in ("lora_A", "lora_B"):
            value = stated[f"base_model.model.{path}.{side}.weight"].float()
            assert torch.equal(getattr(layer.adapter("default"), side), value)


def test_missing_and_damaged_folders(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"holds no adapter_config\.json"):
        ll.import_peft(llama(), tmp_path / "elsewhere")
    (saved / peft_rules.TENSORS).write_bytes((saved / peft_rules.TENSORS).read_bytes()[:-20])
    with pytest.raises(AdapterFileError, match="truncated or damaged"):
        ll.import_peft(llama(), saved)
    (saved / peft_rules.CONFIG).write_text("{")
    with pytest.raises(AdapterFileError, match="is damaged"):
        ll.import_peft(llama(), saved)
