"""Files of transformers 4: experts one by one, vision-language towers under other names; peft reads most too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from model_classes import model_class
from peft_models import PEFT_WARNINGS, LoRA, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.peft import rules
from lora_lightning.exporters.peft.former_names import taken_for_former
from lora_lightning.exporters.preview import refusals
from lora_lightning.testing import perturb

pytestmark = [
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(3, 12)[None]


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(num_local_experts=4, **SMALL)
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def qwen3() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8, **SMALL
    )
    return seeded(lambda: transformers.Qwen3MoeForCausalLM(config))


def olmoe() -> nn.Module:
    config = transformers.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **SMALL)
    return seeded(lambda: transformers.OlmoeForCausalLM(config))


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=4, q_lora_rank=4,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, moe_intermediate_size=12, **SMALL,
    )  # fmt: skip
    return seeded(lambda: transformers.DeepseekV3ForCausalLM(config))


EXPERTS: dict[str, tuple[Any, str, tuple[str, str, str], int, int]] = {
    "Mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2"), 24, 0),
    "Qwen3-MoE": (qwen3, "mlp", ("gate_proj", "up_proj", "down_proj"), 12, 0),
    "OLMoE": (olmoe, "mlp", ("gate_proj", "up_proj", "down_proj"), 24, 0),
    "DeepSeek-V3": (deepseek, "mlp", ("gate_proj", "up_proj", "down_proj"), 12, 1),
}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / rules.TENSORS, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / rules.CONFIG).write_text(json.dumps(settings))


def one_by_one(block: str, names: tuple[str, str, str], width: int, first: int) -> dict[str, Tensor]:
    """Factors of every expert of two blocks, as transformers 4 named them."""
    torch.manual_seed(3)
    found = {}
    for layer in range(first, 2):
        for expert in range(4):
            for name in names:
                d_in, d_out = (width, 16) if name == names[2] else (16, width)
                path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                found[f"{path}.lora_A.weight"] = torch.randn(2, d_in) * 0.3
                found[f"{path}.lora_B.weight"] = torch.randn(d_out, 2) * 0.3
    return found


@pytest.mark.parametrize(("build", "block", "names", "width", "first"), EXPERTS.values(), ids=EXPERTS)
def test_experts_one_by_one(
    build: Any, block: str, names: tuple[str, str, str], width: int, first: int, tmp_path: Path
) -> None:
    tensors = one_by_one(block, names, width, first)
    dense = {}
    if first:  # names of the experts select the dense MLP too
        for name in names:
            for block_ in (("layers.0.mlp", 24), ("layers.1.mlp.shared_experts", 12)):
                d_in, d_out = (block_[1], 16) if name == names[2] else (16, block_[1])
                dense[f"base_model.model.model.{block_[0]}.{name}.lora_A.weight"] = torch.randn(2, d_in) * 0.3
                dense[f"base_model.model.model.{block_[0]}.{name}.lora_B.weight"] = torch.randn(d_out, 2) * 0.3
    write(tmp_path, {**tensors, **dense}, target_modules=list(names))
    model, base = build(), build()
    ll.import_peft(model, tmp_path)
    expected = build()
    weights = dict(expected.named_parameters())
    with torch.no_grad():  # 3 B A on each expert's own matrix
        for key in [key for key in tensors if "lora_A" in key]:
            B, A = tensors[key.replace("lora_A", "lora_B")], tensors[key]
            layer, expert, name = key.split(".")[4], int(key.split(".")[7]), key.split(".")[8]
            stack = "down_proj" if name == names[2] else "gate_up_proj"
            weight = weights[f"model.layers.{layer}.mlp.experts.{stack}"][expert]
            start = width if name == names[1] else 0
            weight[start : start + B.shape[0]] += 3 * B @ A
        for key in [key for key in dense if "lora_A" in key]:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{path}.weight"] += 3 * dense[key.replace("lora_A", "lora_B")] @ dense[key]
    assert not torch.allclose(base(IDS).logits, expected(IDS).logits, atol=1e-3)
    torch.testing.assert_close(model.eval()(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    if not first:  # beside dense layers peft selects the experts only
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "0.block_sparse_moe.experts.2.w3",
            r"factors for 7 of 8 matrices of model\.layers\.0\.mlp\.experts\.gate_up_proj",
        ),
        ("layers.1.", r"no factors for 2 layers .* selects: model\.layers\.1\.mlp\.experts\.gate_up_proj"),
    ],
)
def test_experts_of_which_some_are_missing(lost: str, message: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in one_by_one("block_sparse_moe", ("w1", "w3", "w2"), 24, 0).items() if lost not in k}
    write(tmp_path, tensors, target_modules=["w1", "w2", "w3"])
    with pytest.raises(AdapterFileError, match=message):
        ll.import_peft(mixtral(), tmp_path)


VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def llava() -> nn.Module:
    config = transformers.LlavaConfig(vision_config=VISION, text_config={"model_type": "llama", **SMALL})
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config))


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(vision_config=VISION, text_config={"head_dim": 8, **SMALL})
    return seeded(lambda: transformers.Gemma3ForConditionalGeneration(config))


def qwen2_vl() -> nn.Module:
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config={**SMALL, "rope_parameters": rope})
    return seeded(lambda: transformers.Qwen2VLForConditionalGeneration(config))


TOWERS: dict[str, tuple[Any, str]] = {
    "LLaVA": (llava, "language_model.model.layers"),
    "Gemma 3": (gemma3, "language_model.model.layers"),
    "Qwen2-VL": (qwen2_vl, "model.layers"),
}


@pytest.mark.parametrize(("build", "former"), TOWERS.values(), ids=TOWERS)
def test_towers_under_their_former_names(build: Any, former: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        path = f"base_model.model.{former}.{layer}.self_attn.o_proj"
        tensors |= {f"{path}.lora_A.weight": torch.randn(2, 16), f"{path}.lora_B.weight": torch.randn(16, 2)}
    write(tmp_path, tensors, target_modules=["o_proj"])
    model = build()
    report = ll.import_peft(model, tmp_path)
    assert set(report.layers) == {f"model.language_model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    expected = build()
    with torch.no_grad():
        for layer in range(2):
            path = f"base_model.model.{former}.{layer}.self_attn.o_proj"
            update = 3 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
            expected.get_parameter(f"model.language_model.layers.{layer}.self_attn.o_proj.weight").add_(update)
    torch.testing.assert_close(model.eval()(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    if build is not qwen2_vl:  # whose former names peft 0.21.2 does not know
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(IDS).logits, build()(IDS).logits, atol=1e-3)


def test_a_name_that_never_was_stays_an_error(tmp_path: Path) -> None:
    path = "base_model.model.language_model.model.layers.0.self_attn.o_porj"
    write(tmp_path, {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)})
    with pytest.raises(AdapterFileError, match=r"adapts language_model\.model\.layers\.0\.self_attn\.o_porj, which"):
        ll.import_peft(llava(), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Laguna", "Inkling2", "Qwen3Moe", "Llama"])
def test_present_names_that_peft_takes_for_former_ones_are_those_that_it_does_not_load(name: str) -> None:
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    model = model_class(f"{name}ForCausalLM").build()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    taken = taken_for_former(model, paths)
    if rules.renames_experts(model, []):  # names of experts are another rule
        paths = [path for path in paths if path.rpartition(".")[2] not in ("gate_proj", "up_proj", "down_proj")]
        paths += [path for path in taken if path not in paths]
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=".*q_proj"))
    tensors = {f"base_model.model.{path}.lora_A.weight": torch.zeros(1, 1) for path in paths}
    present = convert_peft_adapter_state_dict_for_transformers(theirs, theirs.peft_config["default"], tensors)
    assert {path for path in paths if f"base_model.model.{path}.lora_A.weight" not in present} == taken.keys()


def test_a_layer_that_has_a_former_name_travels_under_it(tmp_path: Path) -> None:
    """peft makes the present name of it; the present name itself it would take for another former one."""
    found = model_class("LagunaForCausalLM")
    model = found.build()
    ll.inject(model, LoRA(rank=1), ["shared_experts.gate_proj", "q_proj"], seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapters, size=0.1)
    assert "peft" not in refusals(model)
    ll.export(model, tmp_path)
    with safe_open(tmp_path / rules.TENSORS, "pt") as file:
        assert any(".mlp.shared_expert.gate_proj.lora_A" in key for key in file.keys())  # noqa: SIM118 - not a dict
    expected, again = model(IDS).logits, found.build()
    theirs = peft.PeftModel.from_pretrained(found.build(), tmp_path).eval()
    ll.import_peft(again, tmp_path)
    for other in (theirs, again):
        torch.testing.assert_close(other(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, found.build()(IDS).logits, atol=1e-4)


def test_a_layer_without_one_is_refused_before_training_and_the_others_travel(tmp_path: Path) -> None:
    model = model_class("Inkling2ForCausalLM").build()
    ll.inject(model, LoRA(rank=1), ["weight_proj", "q_proj"], seed=0)
    with pytest.raises(ExportError, match=r"k_sconv\.weight_proj: peft takes the name for a former one"):
        ll.export(model, tmp_path / "out")
    assert "for a former one" in refusals(model)["peft"]
    ll.eject(model)
    ll.inject(model, LoRA(rank=1), ["weight_proj", "q_proj"], exclude=["weight_proj"], seed=0)
    assert "peft" not in refusals(model)
    ll.export(model, tmp_path / "out", verify=False)
