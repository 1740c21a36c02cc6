"""Against peft itself: what we export computes the same there, and what it saves computes and trains the same here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft_models import Build, DoRA, LoRA, RoseLoRA, from_peft, llama, randomise, seeded
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft.apply import apply_folder
from lora_lightning.injection.records import adapters_named

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21.2 reads a name that transformers 5.23 has renamed
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # peft takes its own one-dimensional lora_B.bias for a sharded factor
    "ignore:Adapter 'default'. .*LoRA tensor.s. have invalid shape. .*lora_B.bias:peft.utils.warning.PeftWarning",
)


def bert_config() -> Any:
    return transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip


def bert() -> nn.Module:
    return seeded(lambda: transformers.BertForSequenceClassification(bert_config()))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32
    )
    return seeded(lambda: transformers.DistilBertForSequenceClassification(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def shared_experts() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    return seeded(lambda: transformers.Qwen2MoeForCausalLM(config))


class Convolutions(nn.Module):
    """Strided and padded convolutions in one and two dimensions; two paths of which one is the other's ending."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.line = nn.Conv1d(6, 5, 3, padding="same")
        self.proj = nn.Linear(5, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(torch.relu(self.image(x))).flatten(2)
        return self.inner["proj"](torch.relu(self.proj(self.line(h).mean(-1))))


def convolutions() -> nn.Module:
    return seeded(Convolutions)


def output(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    if isinstance(getattr(model, "base_model", model), Convolutions) or hasattr(model, "inner"):
        return model(torch.randn(2, 3, 8, 8))
    ids = torch.randint(3, 40, (2, 7))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def drop_ranks(model: nn.Module) -> None:
    """Different numbers of rank components per layer, none at all in the first."""
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        adapter.rank_mask.fill_(False)
        adapter.rank_mask[1 : 1 + i % 4] = True


def make_sparse(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for adapter in adapters_named(model, "default").values():
            for entry in adapter.masks():
                entry.mask.copy_(torch.rand_like(entry.param) < 0.3)
                entry.param.mul_(entry.mask)


def nothing(model: nn.Module) -> None:
    pass


CASES = {
    "llama": (llama, LoRA(rank=4, alpha=8), {}, nothing),
    "llama attention": (llama, LoRA(rank=3, alpha=5), {"targets": ["q_proj", "v_proj"]}, nothing),
    "llama some layers": (llama, LoRA(rank=2), {"targets": r"model\.layers\.1\..*_proj"}, nothing),
    "rslora": (llama, LoRA(rank=4, scaling_rule="alpha/sqrt(r)"), {}, nothing),
    "frozen A": (llama, LoRA(rank=4, train="B"), {}, nothing),
    "bias": (bert, LoRA(rank=2, bias=True), {}, nothing),
    "some biases": (bert, LoRA(rank=2), {"overrides": {"query": {"bias": True}}}, nothing),
    "heads and pooler": (bert, LoRA(rank=2), {}, nothing),
    "classifier only": (bert, LoRA(rank=2), {"also_train": ["classifier"]}, nothing),
    "no head trained": (bert, LoRA(rank=2), {"also_train": []}, nothing),
    "head with a longer namesake": (distilbert, LoRA(rank=2), {"also_train": ["classifier"]}, nothing),
    "overrides": (
        llama,
        LoRA(rank=4, alpha=8),
        {"overrides": {"layers.0": {"rank": 2}, "down_proj": {"alpha": 3.0}, "layers.1.self_attn": {"rank": 6}}},
        nothing,
    ),
    "rank mask": (llama, LoRA(rank=4, alpha=8), {"targets": "attention"}, drop_ranks),
    "rose": (bert, RoseLoRA(rank=4, alpha=16), {}, make_sparse),
    "gpt2": (gpt2, LoRA(rank=2, alpha=3), {}, nothing),
    "dora": (llama, DoRA(rank=4, alpha=8), {}, nothing),
    "dora rslora": (llama, DoRA(rank=3, scaling_rule="alpha/sqrt(r)", dropout=0.1), {"targets": "mlp"}, nothing),
    "dora full gradient": (llama, DoRA(rank=2, detach_norm=False), {"targets": ["v_proj"]}, nothing),
    "dora heads and pooler": (bert, DoRA(rank=2), {}, nothing),
    "dora overrides": (
        llama,
        DoRA(rank=4),
        {"overrides": {"layers.0": {"rank": 2}, "down_proj": {"alpha": 3.0}}},
        nothing,
    ),
    "dora gpt2": (gpt2, DoRA(rank=2, alpha=3), {}, nothing),
    "dora embedding": (llama, DoRA(rank=2), {"targets": ["embed_tokens", "q_proj"]}, nothing),
    "dora position embedding": (gpt2, DoRA(rank=2), {"targets": ["wpe"]}, nothing),
    "dora convolutions": (convolutions, DoRA(rank=2), {"targets": ["image", "point", "line", "inner.proj"]}, nothing),
    "embedding": (llama, LoRA(rank=2), {"targets": ["embed_tokens", "q_proj"]}, nothing),
    "position embedding": (gpt2, LoRA(rank=2), {"targets": ["wpe"]}, nothing),
    "output layer": (llama, LoRA(rank=2), {"targets": ["lm_head", "down_proj"]}, nothing),
    "attention beside experts": (shared_experts, LoRA(rank=2), {"targets": ["layers.1.self_attn.q_proj"]}, nothing),
    "shared experts": (shared_experts, LoRA(rank=2), {"targets": ["shared_expert.up_proj"]}, nothing),
    "convolutions": (convolutions, LoRA(rank=2), {"targets": ["image", "point", "line"]}, nothing),
    "a path that ends like another": (convolutions, LoRA(rank=2), {"targets": "proj|image"}, nothing),
    "both such paths": (
        convolutions,
        LoRA(rank=2),
        {"targets": ["proj"], "overrides": {"^proj$": {"rank": 3, "alpha": 1.0}}},
        nothing,
    ),
}


@pytest.mark.parametrize(("build", "method", "options", "change"), CASES.values(), ids=CASES)
def test_peft_computes_the_same(
    build: Build, method: ll.Method, options: dict[str, Any], change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    base, model = output(build()), build()
    ll.inject(model, method, **options)
    randomise(model)
    change(model)
    expected = output(model.eval())
    assert not torch.allclose(base, expected, atol=1e-3), "the adapter must do something"
    report = ll.export(model, tmp_path / "out")
    assert report.difference is not None
    assert report.difference < 1e-6
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "out").eval()
    torch.testing.assert_close(output(theirs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output(model), expected, atol=0, rtol=0)
    found = {name for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    assert found == {f"base_model.model.{path}" for path in adapters_named(model, "default")}
    by_rules = build()
    apply_folder(peft_file.read(tmp_path / "out", {}), by_rules)
    torch.testing.assert_close(output(by_rules.eval()), expected, atol=1e-5, rtol=1e-5)
    check_merged(model, theirs.merge_and_unload())


def check_merged(model: nn.Module, theirs: nn.Module) -> None:
    ll.merge(model)
    for path, layer in ll.iter_adapters(model):
        other = theirs.get_submodule(path)
        torch.testing.assert_close(other.weight, layer.base.weight, atol=1e-6, rtol=1e-5)
        if getattr(other, "bias", None) is not None:
            torch.testing.assert_close(other.bias, layer.base.bias, atol=1e-6, rtol=1e-5)


TIED = "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("options", [{"targets": ["embed_tokens"]}, {"also_train": ["embed_tokens"]}], ids=str)
def test_tied_weights_travel(options: dict[str, Any], tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    ll.inject(model, LoRA(rank=2), **options)
    randomise(model)
    ll.export(model, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "out").eval()
    torch.testing.assert_close(output(theirs), output(model.eval()), atol=1e-5, rtol=1e-5)
    again = llama(tie_word_embeddings=True)
    ll.import_peft(again, tmp_path / "out")
    assert torch.equal(output(again.eval()), output(model))


def test_a_bias_on_a_layer_without_one(tmp_path: Path) -> None:
    model = llama()
    ll.inject(model, LoRA(rank=2, bias=True), targets=["q_proj"])
    randomise(model)
    report = ll.export(model, tmp_path / "out")
    assert "q_proj has no bias of its own, so peft loads this adapter but cannot merge it" in str(report)
    with pytest.warns(peft.utils.warning.PeftWarning, match="merging LoRA weights won't be possible"):
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    torch.testing.assert_close(output(theirs), output(model.eval()), atol=1e-5, rtol=1e-5)


def test_a_truncated_update_is_what_peft_loads(tmp_path: Path) -> None:
    model = llama()
    ll.inject(model, LoRA(rank=6, alpha=4))
    randomise(model)
    report = ll.export(model, tmp_path / "out", rank=3)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").base_model.model
    for path, adapter in adapters_named(model, "default").items():
        A, B = adapter.low_rank()
        layer = theirs.get_submodule(path)
        lost = (layer.get_delta_weight("default") - B @ A).square().sum() / (B @ A).square().sum()
        assert float(lost) == pytest.approx(report.discarded[path], rel=1e-3)


def test_peft_takes_names_for_fused_experts() -> None:
    """Why such an export is refused; when this fails, the refusal in peft_rules can go."""
    config = transformers.Glm4MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip
    options = peft.LoraConfig(target_modules=["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="Cannot convert PEFT target"):
        peft.get_peft_model(transformers.Glm4MoeForCausalLM(config), options)


def test_dora_round_trip_keeps_all_tensors_bit_for_bit(tmp_path: Path) -> None:
    model, again = llama(), llama()
    ll.inject(model, DoRA(rank=4, alpha=8), overrides={"layers.0.mlp": {"rank": 2, "alpha": 3.0}})
    randomise(model)
    report = ll.export(model, tmp_path / "out")
    assert report.kind == "native"
    assert json.loads((tmp_path / "out" / peft_rules.CONFIG).read_text())["use_dora"] is True
    assert ll.import_peft(again, tmp_path / "out").method == DoRA(rank=4, alpha=8)
    own, back = model.state_dict(), again.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)
    assert torch.equal(output(model), output(again.eval()))


def test_round_trip_keeps_factors_bit_for_bit(tmp_path: Path) -> None:
    model = llama()
    ll.inject(model, LoRA(rank=4, alpha=8), overrides={"layers.0.mlp": {"rank": 2, "alpha": 3.0}})
    randomise(model)
    ll.export(model, tmp_path / "out")
    again = llama()
    report = ll.import_peft(again, tmp_path / "out")
    assert report.method == LoRA(rank=4, alpha=8)
    for path, adapter in adapters_named(model, "default").items():
        (ours,), (back,) = adapter.factor_pairs(), again.get_submodule(path).adapter("default").factor_pairs()
        assert torch.equal(ours.lora_A, back.lora_A)
        assert torch.equal(ours.lora_B, back.lora_B)
        assert ours.scaling == back.scaling
    assert torch.equal(output(model), output(again.eval()))


THEIRS = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r"layers\.0\..*_proj": 2, "model.layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    # alpha = r: Adam's step does not depend on the size of a gradient, and theirs trains bias / scaling
    "bias": (bert, {"target_modules": ["query", "output.dense"], "lora_bias": True, "lora_alpha": 4}),
    "heads": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "k_proj"], "lora_dropout": 0.1}),
    "convolutions": (convolutions, {"target_modules": ["image", "point", "line"]}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora rslora": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True, "use_dora": True},
    ),
    "dora heads": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS", "use_dora": True}),
    "dora gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "dora embedding": (
        llama,
        {"target_modules": ["embed_tokens", "k_proj"], "lora_dropout": 0.1, "use_dora": True},
    ),
    "dora convolutions": (convolutions, {"target_modules": ["image", "point", "line"], "use_dora": True}),
}


SAVES_EMBEDDING = "ignore:Setting `save_embedding_layers` to `True`:UserWarning"


@pytest.mark.filterwarnings(SAVES_EMBEDDING)
@pytest.mark.parametrize(("build", "options"), THEIRS.values(), ids=THEIRS)
def test_we_compute_the_same(build: Build, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = from_peft(build, tmp_path, **options)
    ours = build()
    report = ll.import_peft(ours, tmp_path)
    torch.testing.assert_close(output(ours.eval()), output(theirs), atol=1e-5, rtol=1e-5)
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert report.trainable_parameters == trainable == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert not report.notes


@pytest.mark.filterwarnings(SAVES_EMBEDDING)
@pytest.mark.parametrize(("build", "options"), THEIRS.values(), ids=THEIRS)
def test_gradients_and_one_step_are_equal(build: Build, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = from_peft(build, tmp_path, **options)
    ours = build()
    ll.import_peft(ours, tmp_path)
    for model in (theirs, ours):
        model.eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
        output(model).square().mean().backward()
        optimizer.step()
    own = state_in_peft_names(ours)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", "")
            mine = own.pop(key)
            torch.testing.assert_close(mine.grad.reshape(parameter.shape), parameter.grad, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(mine.reshape(parameter.shape), parameter, atol=1e-6, rtol=1e-5)
    assert not [key for key, parameter in own.items() if parameter.requires_grad]


def state_in_peft_names(model: nn.Module) -> dict[str, nn.Parameter]:
    names = {}
    for name, parameter in model.named_parameters():
        for side in ("A", "B"):
            kind = f"lora_embedding_{side}" if "embed_tokens" in name else f"lora_{side}.weight"
            name = name.replace(f".adapters.default.lora_{side}", f".{kind}")
        name = name.replace(".adapters.default.magnitude", ".lora_magnitude_vector.weight")
        names[name.replace(".adapters.default.bias_delta", ".lora_B.bias")] = parameter
    return names
