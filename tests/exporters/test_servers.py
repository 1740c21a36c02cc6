"""What a server refuses is said by the export and before training, and what is exact in another form is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported_models import SMALL, LoRA, adapted, bert, llama, logits, randomise
from safetensors.torch import load_file
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.servers import preview
from lora_lightning.methods import Method

DoRA, MoELoRA = ll.method("DoRA"), ll.method("MoELoRA")


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def wide() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": 40, "hidden_size": 520}))


CONVERTED: dict[str, tuple[str, Any, Method, dict[str, Any], str]] = {
    "DoRA": ("vllm", llama, DoRA(rank=2), {}, r"it reads no use_dora \(DoRA\)"),
    "a head": ("vllm", llama, LoRA(rank=2), {"also_train": ["lm_head"]}, r"modules_to_save .* and lm_head\.weight"),
    "a classifier": ("vllm", bert, LoRA(rank=2), {}, r"modules_to_save and no biases, and bert"),
    "rows of tokens": ("vllm", llama, LoRA(rank=2), {"train_tokens": {"model.embed_tokens": [1, 2]}}, "no rows of tok"),
    "an embedding": ("vllm", llama, LoRA(rank=2), {"targets": ["embed_tokens"]}, 'layer of kind "embedding"'),
    "the output layer": ("vllm", llama, LoRA(rank=2), {"targets": ["lm_head"]}, "lm_head is the output layer"),
    "a class without adapters": ("vllm", gpt2, LoRA(rank=2), {}, "serves GPT2LMHeadModel without adapters"),
    "a rank": (
        "vllm",
        wide,
        LoRA(rank=513),
        {"targets": ["layers.0.self_attn.q_proj"]},
        "largest rank is 512.*has 513",
    ),
    "DoRA in llama.cpp": ("llama.cpp", llama, DoRA(rank=2), {}, "DoRA is a LoRA with use_dora"),
    "a head in llama.cpp": (
        "llama.cpp",
        llama,
        LoRA(rank=2),
        {"also_train": ["lm_head"]},
        "lm_head.weight trains in fu",
    ),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_what_is_refused_as_an_adapter_is_merged_and_said_before(case: str, tmp_path: Path) -> None:
    server, build, method, options, message = CONVERTED[case]
    model = build()
    ll.inject(model, method, **options)
    said = preview(model, server)
    randomise(model)
    model.eval()
    report = ll.export(model, tmp_path / "out", server=server)
    assert report.format == "merged"
    assert any(f"{server} refuses the adapter itself, so the model is merged" in note for note in report.notes)
    assert [note for note in report.notes if note in said] == said
    with pytest.raises(ExportError, match=message):
        ll.export(model, tmp_path / "other", "gguf" if server == "llama.cpp" else "peft", server=server)
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


HARD = {
    "an update that depends on its input": (
        "vllm",
        llama,
        MoELoRA(experts=2, top_k=2, rank=2),
        ["q_proj"],
        "depends on",
    ),
    "a bias that the class lacks": (
        "vllm",
        llama,
        LoRA(rank=2, bias=True),
        ["q_proj"],
        r"no lora_bias.*Merged: .*no bias",
    ),
    "classes": ("llama.cpp", bert, LoRA(rank=2), ["query"], "Merged: it has no heads of classes"),
}


@pytest.mark.parametrize("case", HARD)
def test_what_is_served_in_no_form_is_refused_and_said_before(case: str, tmp_path: Path) -> None:
    server, build, method, targets, message = HARD[case]
    model = build()
    ll.inject(model, method, targets)
    (said,) = preview(model, server)
    with pytest.raises(ExportError, match=message) as refused:
        ll.export(model, tmp_path / "out", server=server)
    assert str(refused.value) == said
    assert said.startswith(f"{server} serves this adapter in no form")


def test_ranks_and_scalings_become_one_for_vllm(tmp_path: Path) -> None:
    """It takes lora_alpha / r of the whole file for each layer, whatever the patterns say."""
    pytest.importorskip("peft")
    model = llama()
    overrides = {"q_proj": {"rank": 2, "alpha": 7.0}, "down_proj": {"rank": 5, "alpha": 0.5}}
    ll.inject(model, LoRA(rank=3, alpha=5.0, scaling_rule="alpha/sqrt(r)"), overrides=overrides)
    randomise(model)
    report = ll.export(model, tmp_path / "out", server="vllm")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & config.keys()
    assert config["r"] == 5
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path, layer in ll.iter_adapters(model):
        A, B = (tensors[f"base_model.model.{path}.lora_{end}.weight"].double() for end in "AB")
        expected = layer.merged_weight("default", torch.float64) - layer.pretrained_weight(torch.float64)
        torch.testing.assert_close(scaling * B @ A, expected, rtol=1e-5, atol=1e-6)
    assert "verified" in str(report)
    assert report.format == "peft"


def test_a_plain_adapter_keeps_its_factors_and_a_larger_rank_names_the_flag(tmp_path: Path) -> None:
    model = adapted(llama(), LoRA(rank=3))
    assert preview(model, "vllm") == preview(model, "llama.cpp") == []
    ll.export(model, tmp_path / "own", verify=False)
    ll.export(model, tmp_path / "vllm", server="vllm", verify=False)
    own, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "vllm"))
    assert all(torch.equal(own[key], other[key]) for key in own | other)
    large = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": 40, "hidden_size": 48}))
    ll.inject(large, LoRA(rank=24), ["q_proj"])
    assert preview(large, "vllm") == ["rank 24 needs: vllm serve BASE --enable-lora --max-lora-rank 32"]


def test_llama_cpp_takes_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    report = ll.export(adapted(), tmp_path / "out", server="llama.cpp")
    assert report.format == "gguf"
    assert "adapter.gguf" in report.files


def test_unknown_servers_and_formats(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ExportError, match=r'--for is "vlm"\. Did you mean "vllm"'):
        ll.export(model, tmp_path / "out", server="vlm")
    with pytest.raises(ExportError, match=r'--for vllm reads no "delta"\. It reads peft and merged'):
        ll.export(model, tmp_path / "out", "delta", server="vllm")
    with pytest.raises(ExportError, match=r'serve_with is "vlm"\. Did you mean "vllm"'):
        preview(model, "vlm")
    assert preview(llama(), "vllm") == []


def test_a_limited_rank_is_another_way_out_of_dora(tmp_path: Path) -> None:
    report = ll.export(adapted(llama(), DoRA(rank=2)), tmp_path / "out", server="vllm", rank=1)
    assert (report.format, report.kind) == ("peft", "truncated SVD")
