"""The GGUF form of a LoRA, read with gguf's own reader and laid on weights in llama.cpp's order, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from exported_models import SMALL, LoRA, adapted, bert, llama, randomise
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters import llama_cpp
from lora_lightning.methods import Method

gguf = pytest.importorskip("gguf")

DoRA = ll.method("DoRA")
GROUPED = {"vocab_size": 40, **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
}


def read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    found = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).double() for t in reader.tensors
    }
    return reader, found


def stated(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def of_llama_cpp(weight: Tensor, heads: int | None) -> Tensor:
    """Rows of a weight in llama.cpp's order: pair by pair of a head's halves, written with indices."""
    if heads is None:
        return weight
    size = len(weight) // heads
    rows = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_factors_laid_on_the_converted_weights_are_the_converted_merged_ones(
    family: str, dtype: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = adapted(MODELS[family](), LoRA(rank=3, alpha=5.0))
    report = ll.export(model, tmp_path / "out", "gguf", dtype=dtype)
    reader, found = read(tmp_path / "out")
    assert stated(reader, "general.type") == "adapter"
    assert stated(reader, "adapter.type") == "lora"
    assert stated(reader, "general.architecture") == {"mistral": "llama"}.get(family, family)
    alpha = stated(reader, "adapter.lora.alpha")
    assert alpha == 5.0
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, {"mistral": "LLAMA"}.get(family, family.upper())), 2)
    seen = set()
    for path, layer in ll.iter_adapters(model):
        name = names.get_name(path)
        seen |= {f"{name}.weight.lora_a", f"{name}.weight.lora_b"}
        A, B = found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"]
        update = alpha / B.shape[1] * B @ A
        heads = None
        if family in ("llama", "mistral") and path.endswith(("q_proj", "k_proj")):
            heads = 4 if path.endswith("q_proj") else 2
        own = layer.pretrained_weight(torch.float64)
        expected = of_llama_cpp(layer.merged_weight("default", torch.float64), heads) - of_llama_cpp(own, heads)
        tolerance = {None: 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype] * float(expected.abs().max())
        assert float((update - expected).abs().max()) <= tolerance
    assert seen == found.keys()
    assert report.verified_by == "gguf's reader"
    assert report.difference is not None


def test_the_factors_are_the_adapters_own_bit_for_bit(tmp_path: Path) -> None:
    model = adapted(MODELS["qwen2"](), LoRA(rank=3, alpha=5.0))
    ll.export(model, tmp_path / "out", "gguf")
    _, found = read(tmp_path / "out")
    for path, layer in ll.iter_adapters(model):
        name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2).get_name(path)
        own = layer.adapter("default")
        assert torch.equal(found[f"{name}.weight.lora_a"], own.lora_A.double())
        assert torch.equal(found[f"{name}.weight.lora_b"], own.lora_B.double())


def test_other_ranks_and_scalings_share_one_alpha(tmp_path: Path) -> None:
    """Each pair has its own rank in the file, and llama.cpp divides by that."""
    model = MODELS["qwen2"]()
    overrides = {"q_proj": {"rank": 2, "alpha": 7.0}, "down_proj": {"rank": 5, "alpha": 0.5}}
    ll.inject(model, LoRA(rank=3, alpha=5.0, scaling_rule="alpha/sqrt(r)"), overrides=overrides)
    randomise(model)
    ll.export(model, tmp_path / "out", "gguf")
    reader, found = read(tmp_path / "out")
    alpha = stated(reader, "adapter.lora.alpha")
    for path, layer in ll.iter_adapters(model):
        name = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2).get_name(path)
        A, B = found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"]
        expected = layer.merged_weight("default", torch.float64) - layer.pretrained_weight(torch.float64)
        torch.testing.assert_close(alpha / len(A) * B @ A, expected, rtol=1e-5, atol=1e-6)
    assert len(found["blk.0.attn_q.weight.lora_a"]) == 2


def test_embedding_and_output_layer_of_an_untied_model(tmp_path: Path) -> None:
    model = adapted(llama(), LoRA(rank=2), targets=["embed_tokens", "lm_head"])
    ll.export(model, tmp_path / "out", "gguf")
    _, found = read(tmp_path / "out")
    assert tuple(found["token_embd.weight.lora_a"].shape) == (40, 2)
    assert tuple(found["token_embd.weight.lora_b"].shape) == (16, 2)
    assert tuple(found["output.weight.lora_b"].shape) == (40, 2)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=40, **SMALL))


CASES: dict[str, tuple[Any, Method, dict[str, Any], str]] = {
    "another family": (phi, LoRA(rank=2), {}, r"PhiForCausalLM is no language model of .*llama.*convert_hf_to_gguf"),
    "a classifier": (bert, LoRA(rank=2), {}, r"BertForSequenceClassification is no language model"),
    "a head": (llama, LoRA(rank=2), {"also_train": ["lm_head"]}, r"lm_head\.weight trains in full, .*no heads"),
    "DoRA": (llama, DoRA(rank=2), {}, r"DoRA is a LoRA with use_dora.*which is exact"),
    "a bias": (llama, LoRA(rank=2, bias=True), {}, r"q_proj trains a bias, which a GGUF adapter has no place for"),
    "a tied layer": (tied, LoRA(rank=2), {"targets": ["embed_tokens"]}, r"embed_tokens shares its weight with lm_head"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_format_does_not_know_is_refused_by_name(case: str, tmp_path: Path) -> None:
    build, method, options, message = CASES[case]
    model = build()
    ll.inject(model, method, **options)
    randomise(model)
    with pytest.raises(ExportError, match=message):
        ll.export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_layer_without_a_name_in_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["gemma"]()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied, as no Gemma is there
    ll.inject(model, LoRA(rank=2), targets=["lm_head"])
    with pytest.raises(ExportError, match=r"lm_head has no name in llama\.cpp's GemmaForCausalLM"):
        ll.export(model, tmp_path / "out", "gguf")


def test_numbers_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    model = adapted()
    next(ll.iter_adapters(model))[1].adapter("default").lora_B.data.fill_(1e6)
    with pytest.raises(ExportError, match="not finite"):
        ll.export(model, tmp_path / "out", "gguf", dtype="float16")
    ll.export(model, tmp_path / "out", "gguf", dtype="bfloat16")


@pytest.mark.parametrize("what", ["a factor", "alpha", "a name"])
def test_a_damaged_file_is_found_on_reading_back(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    add, number = gguf.GGUFWriter.add_tensor, gguf.GGUFWriter.add_float32

    def tensor(self: Any, name: str, values: np.ndarray, **options: Any) -> None:
        values = values * np.float32(1.01) if what == "a factor" and "attn_q" in name else values
        add(self, name.replace("attn_q", "attn_x") if what == "a name" else name, values, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", tensor)
    off = 1.0 if what == "alpha" else 0.0
    monkeypatch.setattr(gguf.GGUFWriter, "add_float32", lambda self, key, value: number(self, key, value + off))
    with pytest.raises(ExportError, match="read back"):
        ll.export(model, tmp_path / "out", "gguf")


def test_without_the_package_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'pip install "lora-lightning\[gguf\]"'):
        ll.export(adapted(), tmp_path / "out", "gguf")


def test_a_truncated_update_and_a_data_type_that_the_format_has_not(tmp_path: Path) -> None:
    report = ll.export(adapted(llama(), DoRA(rank=2)), tmp_path / "out", "gguf", rank=1)
    assert report.kind == "truncated SVD"
    assert report.discarded
    with pytest.raises(ExportError, match=r'dtype is "float8" with format="gguf"\. Known|Did you mean'):
        ll.export(adapted(), tmp_path / "out", "gguf", dtype="float8")
