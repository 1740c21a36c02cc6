"""A merged model in another data type is merged in float32 first and rounded once; a quantized one opens anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported_models import SMALL, LoRA, adapted, llama
from safetensors.torch import load_file

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters import precision
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.models.anatomy import survey

HALVES = ["bfloat16", "float16"]


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_each_weight_is_the_merged_one_rounded_once(dtype: str, tmp_path: Path) -> None:
    model = adapted()
    report = ll.export(model, tmp_path / "out", "merged", dtype=dtype)
    files = load_file(tmp_path / "out" / "model.safetensors")
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in files.values()} == {wanted}
    ll.export(model, tmp_path / "plain", "merged")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for path, layer in ll.iter_adapters(model):
        assert torch.equal(files[f"{path}.weight"], plain[f"{path}.weight"].to(wanted)), path
        exact = layer.merged_weight("default", torch.float64)
        rounding = torch.finfo(wanted).eps / 2 * exact.abs() + 1e-6
        assert ((files[f"{path}.weight"].double() - exact).abs() <= rounding).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == wanted
    assert report.difference == 0.0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), LoRA(rank=2), targets=["q_proj"])
    ll.export(model, tmp_path / "out", "merged", dtype="bfloat16")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_model_that_was_rounded_before_is_refused_another_type(tmp_path: Path) -> None:
    model = adapted(llama().to(torch.bfloat16))
    for dtype in ("float16", "float32"):
        with pytest.raises(ExportError, match=rf"q_proj is bfloat16, so merging rounds to it, not to {dtype}"):
            ll.export(model, tmp_path / "out", "merged", dtype=dtype)
    ll.export(model, tmp_path / "out", "merged", dtype="bfloat16")


def test_a_number_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = adapted()
    next(ll.iter_adapters(model))[1].adapter("default").lora_B.data.fill_(1e6)
    with pytest.raises(ExportError, match="the model in float16 holds values that are not finite"):
        ll.export(model, tmp_path / "out", "merged", dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat61"}, r'dtype is "bfloat61" with format="merged"\. Did you mean "bfloat16"'),
        ({"quantize": "nf5"}, r'quantize is "nf5" with format="merged"\..*nf4'),
        ({"dtype": "bfloat16", "format": "peft"}, r'dtype is "bfloat16" with format="peft"\. The format takes none'),
        ({"quantize": "nf4", "format": "delta"}, r'quantize is "nf4" with format="delta"\. The format takes none'),
    ],
)
def test_options_that_a_format_has_not(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        ll.export(adapted(), tmp_path / "out", **{"format": "merged", **options})


def test_without_bitsandbytes_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.models.quantized_loading.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'--quantize is "nf4"; it needs .*: pip install "lora-lightning\[quant\]"'):
        ll.export(adapted(), tmp_path / "out", "merged", quantize="nf4")


def test_a_base_in_half_precision_is_merged_in_float32_from_its_folder(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    ll.save_adapter(model, tmp_path / "adapter")
    for name, options in {"given": {"format": "merged", "dtype": "bfloat16"}, "its own": {"format": None}}.items():
        if name == "its own":
            options |= {"server": "vllm"}
            model = adapted(
                transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
                ll.method("DoRA")(rank=2),
            )  # which that server refuses
            ll.save_adapter(model, tmp_path / "adapter")
        export_folder(tmp_path / "adapter", tmp_path / name, **options)
        files = load_file(tmp_path / name / "model.safetensors")
        for path, layer in ll.iter_adapters(model):
            exact = layer.merged_weight("default", torch.float64)
            off = (files[f"{path}.weight"].double() - exact).abs()
            assert (off <= 2.0**-8 * exact.abs() + 1e-9).all()
            assert files[f"{path}.weight"].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("format", ["nf4", "nf4-double"])
def test_a_quantized_folder_opens_in_a_fresh_process_and_computes_nearly_the_same(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, **{**SMALL, "hidden_size": 64, "intermediate_size": 128})
    model = adapted(transformers.LlamaForCausalLM(config)).eval()
    for _, layer in ll.iter_adapters(model):
        for factor in layer.adapter("default").parameters():
            factor.data /= 10  # an update smaller than the weights, so that few signs of activations change
    report = ll.export(model, tmp_path / "out", "merged", dtype="bfloat16", quantize=format)
    assert 0 < report.difference < 1
    assert any(f"14 layers are {format}" in note for note in report.notes)
    assert not list((tmp_path).glob("tmp*"))
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('out').eval()\n"
        "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'Linear4bit', model\n"
        "assert 'lora_lightning' not in sys.modules\n"
        "ids = torch.load('ids.pt')\n"
        "torch.save(model(ids).logits.detach().float(), 'logits.pt')\n"
    )
    ids = torch.tensor([[1, 5, 7, 2]])
    torch.save(ids, tmp_path / "ids.pt")
    with torch.no_grad():
        expected = model(ids).logits
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "logits.pt")
    assert float((found - expected).norm() / expected.norm()) < 0.25
    ll.export(model, tmp_path / "plain", "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for path, layer in survey(made).quantized.items():
            plain.get_submodule(path).weight.copy_(layer.weight(torch.float32))
        rounded = plain(ids).logits  # the same rounded weights, computed in float32
    assert float((found - rounded).norm() / rounded.norm()) < 0.03


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantized_weight_that_was_damaged_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_HALF_STEP", 0.001)  # as if the format were finer than it is
    with pytest.raises(ExportError, match="does not read back as it was, up to quantization"):
        ll.export(adapted(), tmp_path / "out", "merged", quantize="nf4")
