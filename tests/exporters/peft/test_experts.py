"""Fused experts through peft's format, both ways, on both orientations; peft itself is the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.experts import find_stacks, named_in_file, unlike
from lora_lightning.injection.records import adapters_named
from lora_lightning.models.anatomy import survey
from lora_lightning.models.experts import stack
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's call
    # peft looks for its patterns among modules alone, and applies them to parameters all the same
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
Build = Callable[[], nn.Module]


def qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12)
    return _build(transformers.Qwen3MoeForCausalLM, config)


def mixtral() -> nn.Module:
    return _build(transformers.MixtralForCausalLM, transformers.MixtralConfig(**SMALL, num_local_experts=4))


def gpt_oss() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, rope_parameters=rope)
    return _build(transformers.GptOssForCausalLM, config)


def _build(cls: Any, config: Any) -> nn.Module:
    with seeded(0):
        return cls(config).eval()


MODELS = {"qwen": qwen, "mixtral": mixtral, "gpt-oss": gpt_oss}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def output(model: nn.Module) -> Tensor:
    with seeded(1):
        ids = torch.randint(3, 40, (2, 7))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def adapted(build: Build, method: ll.Method, **options: Any) -> nn.Module:
    model = build()
    ll.inject(model, method, seed=0, **options)
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i, size=0.2)
    return model


CASES = {
    "everything": (LoRA(rank=2, alpha=3), {}),
    "experts alone": (LoRA(rank=2, alpha=3), {"targets": "experts"}),
    "one of two": (LoRA(rank=3, alpha=3), {"targets": ["experts.down_proj", "q_proj"]}),
    "ranks of their own": (LoRA(rank=2), {"targets": EXPERTS, "overrides": {"gate_up_proj": {"rank": 3, "alpha": 5}}}),
    "rose": (RoseLoRA(rank=2), {"targets": "experts"}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(model: str, case: str, tmp_path: Path) -> None:
    build, (method, options) = MODELS[model], CASES[case]
    ours = adapted(build, method, **options)
    expected = output(ours)
    assert not torch.allclose(output(build()), expected, atol=1e-3), "the adapter must do something"
    report = ll.export(ours, tmp_path)
    assert report.difference is not None
    assert report.difference < 1e-6
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), expected, atol=1e-5, rtol=1e-5)
    again = build()
    ll.import_peft(again, tmp_path)
    assert torch.equal(output(again), expected)
    merged = theirs.merge_and_unload()
    ll.merge(ours)
    for path, layer in ll.iter_adapters(ours):
        name = layer.base_layer.weight_name(path)
        torch.testing.assert_close(merged.get_parameter(name), layer.base.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[1:], ["experts.gate_up_proj"]], ids=len)
def test_we_compute_the_same(model: str, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(4)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_parameters": targets}
    config = peft.LoraConfig(**options, target_modules=["q_proj"])
    theirs = peft.get_peft_model(MODELS[model](), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = MODELS[model]()
    report = ll.import_peft(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), atol=1e-5, rtol=1e-5)
    assert report.trainable_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_gradients_are_equal(tmp_path: Path) -> None:
    ours = adapted(qwen, LoRA(rank=2, alpha=3), targets="experts")
    ll.export(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(qwen(), tmp_path, is_trainable=True).eval()
    for model in (ours, theirs):
        output(model).square().mean().backward()
    wrapper = theirs.base_model.model.model.layers[0].mlp.experts
    for name, layer in (("down_proj", wrapper), ("gate_up_proj", wrapper.base_layer)):
        (pair,) = adapters_named(ours, "default")[f"model.layers.0.mlp.experts.{name}"].factor_pairs()
        experts = pair.lora_A.shape[0]
        grad_A = layer.lora_A["default"].weight.grad.unflatten(0, (experts, -1))
        grad_B = layer.lora_B["default"].weight.grad.unflatten(1, (-1, experts)).permute(2, 0, 1)
        torch.testing.assert_close(pair.lora_A.grad, grad_A, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(pair.lora_B.grad, grad_B, atol=1e-7, rtol=1e-4)


def test_dora_on_experts_travels_truncated_or_merged(tmp_path: Path) -> None:
    model = adapted(qwen, DoRA(rank=2), targets="experts")
    with pytest.raises(ExportError, match="peft's use_dora does not work on stacked experts"):
        ll.export(model, tmp_path / "peft")
    report = ll.export(model, tmp_path / "svd", rank=4)
    assert all(0 < lost < 1 for lost in report.discarded.values())
    theirs = peft.PeftModel.from_pretrained(qwen(), tmp_path / "svd").base_model.model
    layer = theirs.model.layers[0].mlp.experts
    adapter = adapters_named(model, "default")["model.layers.0.mlp.experts.down_proj"]
    weight = qwen().model.layers[0].mlp.experts.down_proj
    update = (adapter.merged_weight(weight) - weight).detach()
    lost = (layer.get_delta_weight("default") - update).square().sum() / update.square().sum()
    assert float(lost) == pytest.approx(report.discarded["model.layers.0.mlp.experts.down_proj"], rel=1e-3)


@pytest.mark.parametrize("model", ["qwen", "gpt-oss"])
def test_a_merged_model_loads_with_transformers_alone(model: str, tmp_path: Path) -> None:
    ours = adapted(MODELS[model], DoRA(rank=2))
    expected = output(ours)
    ll.export(ours, tmp_path, format="merged")
    plain = type(ours).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(plain), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(output(ours), expected), "the model is as it was"


def test_experts_of_the_file_that_the_model_lacks(tmp_path: Path) -> None:
    ll.export(adapted(qwen, LoRA(rank=2), targets="experts"), tmp_path)
    path = tmp_path / peft_rules.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_parameters": []}))
    with pytest.raises(AdapterFileError, match="do not fit rank 2"):
        ll.import_peft(qwen(), tmp_path)


def test_layouts_that_peft_reads_otherwise() -> None:
    config = transformers.Llama4TextConfig(**SMALL, num_local_experts=2, intermediate_size_mlp=24, moe_layers=[0])
    owner = _build(transformers.Llama4ForCausalLM, config).model.layers[0].feed_forward.experts
    message = "Llama4TextExperts stores matrices as (in, out) without saying so"
    assert message in (unlike(owner, stack(owner, "down_proj")) or "")
    config = transformers.Qwen3MoeConfig(**SMALL | {"num_experts_per_tok": 1}, num_experts=1)
    owner = _build(transformers.Qwen3MoeForCausalLM, config).model.layers[0].mlp.experts
    assert unlike(owner, stack(owner, "down_proj")) is None  # of one expert
    owner.is_transposed = True
    assert "it holds one matrix, stored as (in, out)" in (unlike(owner, stack(owner, "down_proj")) or "")


def test_wrappers_nest_in_the_owners_order() -> None:
    model = adapted(gpt_oss, LoRA(rank=2), targets=["down_proj"])
    owner = "model.layers.0.mlp.experts"
    router = {"model.layers.0.mlp.router": [("model.layers.0.mlp.router.weight", 1)]}
    stacks = {owner: [(f"{owner}.gate_up_proj", 4), (f"{owner}.down_proj", 4)]}
    assert find_stacks(survey(model).layers) == stacks | router
    named = named_in_file(find_stacks(survey(model).layers), EXPERTS)
    assert named == {owner: (f"{owner}.down_proj", 4), f"{owner}.base_layer": (f"{owner}.gate_up_proj", 4)}
    assert named_in_file(find_stacks(survey(model).layers), EXPERTS[:1]) == {owner: (f"{owner}.gate_up_proj", 4)}


def test_a_file_without_the_experts_that_it_selects_is_refused(tmp_path: Path) -> None:
    ll.export(adapted(qwen, LoRA(rank=2), targets=[*EXPERTS, "q_proj"]), tmp_path / "out")
    path = tmp_path / "out" / peft_rules.TENSORS
    tensors = {key: value for key, value in load_file(path).items() if "experts" not in key}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"no factors for 2 layers .*selects: .*experts\.gate_up_proj"):
        ll.import_peft(qwen(), tmp_path / "out")
