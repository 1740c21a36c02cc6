from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted_models import tiny_moe
from architectures import ARCHITECTURES
from exported_models import Gain, LoRA, adapted, assert_untouched, bert, llama, logits, randomise, state_of
from quantized_layers import Steps, serve
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.methods import Method
from lora_lightning.testing import perturb


@pytest.mark.parametrize(
    ("build", "method"),
    [(llama, LoRA(rank=4)), (bert, LoRA(rank=2, bias=True)), (bert, Gain())],
    ids=["llama", "bias and heads", "no low-rank form"],
)
def test_a_merged_model_is_plain_and_ours_is_untouched(
    build: Callable[[], nn.Module], method: Method, tmp_path: Path
) -> None:
    model = adapted(build(), method).eval()
    before, expected = state_of(model), logits(model)
    config = model.config.to_dict()
    report = ll.export(model, tmp_path / "out", format="merged")
    assert_untouched(model, before)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), expected)
    assert (report.kind, report.difference) == ("merged", 0.0)
    plain = build()
    plain.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out")]
    assert files[0].keys() == files[1].keys()
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_bounds_of_the_base_model_may_be_infinite_and_weights_may_not(tmp_path: Path) -> None:
    """Gemma 4 clips what enters and leaves a layer of its towers; unbounded is infinite."""
    architecture = ARCHITECTURES["Gemma 4"]
    model, batch = adapted(architecture.build(), LoRA(rank=2)).eval(), architecture.batch()
    ll.export(model, tmp_path / "out", "merged")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    clipped = plain.get_submodule("model.vision_tower.encoder.layers.0.mlp.up_proj")
    assert (clipped.input_min, clipped.input_max) == (-torch.inf, torch.inf)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
        clipped = model.get_submodule("model.vision_tower.encoder.layers.0.mlp.up_proj")
        clipped.linear.weight[0, 0] = torch.inf
        with pytest.raises(ExportError, match=r"not finite, in model\.vision_tower\S*up_proj\.linear\.weight"):
            ll.export(model, tmp_path / "out", "merged")
        clipped.linear.weight[0, 0] = 0.0
        clipped.output_max.fill_(1e6)
        with pytest.raises(ExportError, match=r"in float16 holds values that are not finite, in \S*up_proj.output_max"):
            ll.export(model, tmp_path / "out", "merged", dtype="float16")


def test_what_was_merged_and_active_stays_so(tmp_path: Path) -> None:
    model = adapted(targets=["q_proj"], name="first")
    ll.inject(model, LoRA(rank=2), targets=["q_proj", "v_proj"], name="second")
    randomise(model)
    ll.set_active(model, ["first", "second"])
    states = []
    for prepare in (lambda: None, lambda: ll.merge(model)):
        prepare()
        before = state_of(model)
        ll.export(model, tmp_path / "out", format="merged", name="second")
        assert_untouched(model, before)
        states.append([(layer.active, layer.merged) for _, layer in ll.iter_adapters(model)])
    assert states[0][0] == (("first", "second"), ())
    assert states[1][0] == (("first", "second"), ("first", "second"))
    alone = llama()
    ll.inject(alone, LoRA(rank=2), targets=["q_proj", "v_proj"])
    for path, layer in ll.iter_adapters(alone):
        layer.adapter("default").load_state_dict(model.get_submodule(path).adapter("second").state_dict())
    ll.merge(alone)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in ll.iter_adapters(alone):
        assert torch.equal(saved[f"{path}.weight"], layer.base.weight)


def test_the_model_is_untouched_when_saving_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(bert(), LoRA(rank=2, bias=True))
    before = state_of(model)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(ExportError, match=r"No space left on device\. What was there before is intact"):
        ll.export(model, tmp_path / "out", format="merged")
    assert_untouched(model, before)
    assert not list(tmp_path.iterdir())


def test_a_model_that_transformers_does_not_save_is_said_to_be_one(tmp_path: Path) -> None:
    model = llama()
    first, second = (block.self_attn for block in model.model.layers[:2])
    second.o_proj.weight = first.o_proj.weight
    before = state_of(adapted(model, targets=["q_proj"]))
    with pytest.raises(ExportError, match=r"does not save this LlamaForCausalLM.*shared tensors.* Use format=\"peft\""):
        ll.export(model, tmp_path / "out", "merged")
    assert_untouched(model, before)
    assert not (tmp_path / "out").exists()
    ll.export(model, tmp_path / "out", "peft")


def test_a_merged_model_that_loads_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    real = type(model).save_pretrained

    def damaged(self: nn.Module, where: Path) -> None:
        real(self, where)
        tensors = load_file(where / "model.safetensors")
        tensors["model.norm.weight"][0] += 1e-6
        save_file(tensors, where / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(ExportError, match=r"does not load again as it was: model\.norm\.weight differs"):
        ll.export(model, tmp_path / "out", format="merged")
    assert not list(tmp_path.iterdir())


def test_mixed_dtypes_are_compared_and_said(tmp_path: Path) -> None:
    model = bert()
    model.bert.encoder.to(torch.bfloat16)
    adapted(model, targets=["query"])
    report = ll.export(model, tmp_path / "out", format="merged")
    assert "several dtypes" in str(report)


def test_merged_needs_a_hugging_face_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ll.inject(model, LoRA(rank=2), targets=["0"])
    with pytest.raises(ExportError, match=r"Sequential is no PreTrainedModel .* merge\(model, keep_original=False\)"):
        ll.export(model, tmp_path / "out", format="merged")


def test_merged_refuses_tied_weights_and_new_biases(tmp_path: Path) -> None:
    tied = adapted(llama(tie_word_embeddings=True), targets=["embed_tokens"])
    with pytest.raises(ExportError, match=r"embed_tokens shares its weight with lm_head"):
        ll.export(tied, tmp_path / "out", format="merged")
    with pytest.raises(ExportError, match="q_proj has no bias in LlamaForCausalLM"):
        ll.export(adapted(method=LoRA(rank=2, bias=True), targets=["q_proj"]), tmp_path / "out", format="merged")


def test_biases_beside_experts_are_refused_with_a_way_out_that_works(tmp_path: Path) -> None:
    """peft's format has no bias for experts, a plain model has none for a bare layer."""
    experts = r"mlp.experts.\w+"

    def biased(**options: Any) -> nn.Module:
        model = tiny_moe()
        ll.inject(model, LoRA(rank=2, bias=True), ["q_proj", "experts"], also_train=(), seed=0, **options)
        for layer in (layer for layer in model.modules() if hasattr(layer, "adapters")):
            perturb(layer.adapter("default"))
        return model

    model = biased(overrides={"experts": {"bias": False}})
    with pytest.raises(
        ExportError, match=rf"q_proj has no bias .* Train with bias=False; or leave out \S+{experts}, and"
    ):
        ll.export(model, tmp_path / "merged", format="merged")
    with pytest.raises(ExportError, match=rf"{experts}: peft's lora_bias .* cannot have it. Train with bias=False, or"):
        ll.export(model, tmp_path / "peft")
    ll.export(biased(exclude=["experts"]), tmp_path / "peft")
    plain = biased(overrides={"experts": {"bias": False}, "q_proj": {"bias": False}})
    ll.export(plain, tmp_path / "plain")
    ll.export(plain, tmp_path / "merged", format="merged")


def test_quantized_layers_are_plain_in_the_file_whatever_is_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has the adapter, one another adapter, and one none."""
    monkeypatch.setattr("lora_lightning.models.base_layers.base_layer_kinds", lambda _: [("ll_steps", serve)])
    model: Any = bert()
    blocks = model.bert.encoder.layer
    for block in blocks:
        block.attention.self.query = Steps(block.attention.self.query)
    blocks[0].attention.self.key = Steps(blocks[0].attention.self.key)
    ll.inject(model, LoRA(rank=1), ["layer.1.attention.self.query"], name="other", also_train=[])
    ll.inject(model, LoRA(rank=2), ["layer.0.attention.self.query"], also_train=[])
    randomise(model)
    before, expected = state_of(model), logits(model)
    modules = {name: id(module) for name, module in model.named_modules()}
    report = ll.export(model, tmp_path / "merged", "merged")
    assert_untouched(model, before)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert report.difference == 0
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(module, Steps) for module in plain.modules())
    assert torch.allclose(logits(plain), expected, atol=1e-5)
