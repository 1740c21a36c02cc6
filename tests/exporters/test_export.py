"""Exports on their own: merged models, refusals, folders, truncation, the report; peft is in test_peft_interop.py."""

from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterFileError, AdapterStateError, ExportError
from lora_lightning.exporters import folder
from lora_lightning.exporters.export import FORMATS
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.exporters.peft import file as peft_file
from lora_lightning.exporters.peft import rules as peft_rules
from lora_lightning.exporters.peft import write as peft_export
from lora_lightning.methods import Method
from lora_lightning.storage.folder import read_folder

LoRA = ll.method("LoRA")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **SMALL, **options)).eval()


def bert(num_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, num_labels=num_labels, **SMALL)
    return transformers.BertForSequenceClassification(config).eval()


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def adapted(model: nn.Module | None = None, method: Method | None = None, **options: Any) -> nn.Module:
    model = llama() if model is None else model
    ll.inject(model, method or LoRA(rank=4, alpha=8), **options)
    return randomise(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 17).view(2, 7)).logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


# -- methods that have no low-rank form --------------------------------------------------------------------------------


class Scaled(Adapter):
    """W' = g * W: full rank, not additive."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(base.d_out))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base.apply(x, self.merged_weight(base.weight()), base.bias)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * self.gain[:, None].to(weight.dtype)

    def reset(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.gain)


@dataclass(frozen=True, kw_only=True)
class Gain(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Scaled(base)


class ScaledOutput(Scaled):
    """y = g * (W x + b): the bias of the layer is scaled, without one there is none."""

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base(x) * self.gain

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.gain.to(bias.dtype)


@dataclass(frozen=True, kw_only=True)
class OutputGain(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return ScaledOutput(base)


@dataclass(frozen=True, kw_only=True)
class Routed(Gain):
    mergeable: ClassVar[bool] = False
    export: ClassVar[str] = "not expressible"


class Folded(Scaled):
    """A low-rank update that states no factor pair: one outer product."""

    additive = True

    def merged_weight(self, weight: Tensor) -> Tensor:
        A, B = (factor.to(weight.dtype) for factor in self.low_rank())
        return weight + B @ A

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 16), self.gain.detach()[:, None]


@dataclass(frozen=True, kw_only=True)
class Outer(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Folded(base)


class Careless(Folded):
    """States a low-rank form that is not its own."""

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 16), self.gain.detach()[:, None]

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + 1.01 * self.gain.detach()[:, None].to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Wrong(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Careless(base)


def test_a_scaled_bias_is_in_the_dense_update_and_is_not_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    model = copy.deepcopy(plain)
    ll.inject(model, OutputGain(), ["0", "1"], also_train=())
    randomise(model)
    ll.export(model, tmp_path / "out", "delta")
    delta = load_file(tmp_path / "out" / "delta.safetensors")
    assert set(delta) == {"0.weight", "0.bias", "1.weight"}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter += delta[name]
    x = torch.randn(5, 6)
    torch.testing.assert_close(plain(x), model(x))
    layer = model[0]
    layer.set_folded("default", DenseUpdate(layer.base_layer))
    with pytest.raises(AdapterStateError, match="ScaledOutput changes the bias, which no folded update holds"):
        layer.fold("default")
    model[1].set_folded("default", DenseUpdate(model[1].base_layer))
    model[1].fold("default")


# -- peft format -------------------------------------------------------------------------------------------------------


def test_the_folder_says_what_is_needed_and_no_more(tmp_path: Path) -> None:
    model = adapted(targets=["q_proj", "v_proj"])
    report = ll.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert report.files == ("adapter_config.json", "adapter_model.safetensors", "lora_lightning.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
    assert str(report).startswith("peft (native): 4 layers to")
    assert "verified by reading back; largest difference" in str(report)
    assert "not verified" in str(ll.export(model, tmp_path / "out", verify=False))


def test_our_description_lies_beside(tmp_path: Path) -> None:
    ll.export(adapted(), tmp_path / "out")
    side = json.loads((tmp_path / "out" / "lora_lightning.json").read_text())
    assert side["method"] == "LoRA"
    assert side["export"]["class"] == "native"
    assert side["export"]["model"] == "LlamaForCausalLM"


def test_a_folded_update_gets_scaling_one(tmp_path: Path) -> None:
    model = adapted(method=Outer(), targets=["q_proj"])
    report = ll.export(model, tmp_path / "out")
    assert report.kind == "exact LoRA"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1)


def test_a_stated_form_that_is_not_the_function_is_found(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"q_proj: the files give an update that differs by .*Nothing was put in place"
    ):
        ll.export(adapted(method=Wrong(), targets=["q_proj"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["factor", "alpha", "head", "layer"])
def test_damage_between_writing_and_reading_is_found(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peft_file.read

    def damaged(directory: Path, stacks: peft_file.Stacks) -> peft_file.PeftFolder:
        read = real(directory, stacks)
        path = next(iter(read.layers))
        layer = read.layers[path]
        if change == "factor":
            layer.A[0, 0] += 1e-3
        elif change == "alpha":
            read.layers[path] = peft_file.PeftLayer(layer.A, layer.B, None, None, 8.01, layer.scaling * 1.001)
        elif change == "head":
            read.heads["classifier.bias"][0] += 1e-6
        else:
            del read.layers[path]
        return read

    monkeypatch.setattr(peft_export.peft_file, "read", damaged)
    with pytest.raises(ExportError, match=r"differs by|bit for bit|other layers or heads"):
        ll.export(adapted(bert()), tmp_path / "out")
    ll.export(adapted(bert()), tmp_path / "unchecked", verify=False)


def test_half_precision_bases_keep_full_precision_factors(tmp_path: Path) -> None:
    model = adapted(llama().to(torch.bfloat16))
    report = ll.export(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert report.difference is not None
    assert report.difference < 1e-6


def test_one_of_several_adapters_merged_or_not(tmp_path: Path) -> None:
    model = adapted(targets=["q_proj"], name="first")
    ll.inject(model, LoRA(rank=2), targets=["v_proj"], name="second")
    ll.merge(model)
    before = state_of(model)
    report = ll.export(model, tmp_path / "out", name="first")
    assert report.layers == 2
    assert_untouched(model, before)
    assert all(layer.merged == layer.active for _, layer in ll.iter_adapters(model))


def test_names_are_relative_to_the_hugging_face_model(tmp_path: Path) -> None:
    wrapper = nn.ModuleDict({"inner": bert()})
    ll.inject(wrapper, LoRA(rank=2))
    randomise(wrapper)
    ll.export(wrapper, tmp_path / "out")
    plain = bert()
    ll.import_peft(plain, tmp_path / "out")
    assert torch.equal(logits(plain.eval()), logits(wrapper["inner"].eval()))


def test_with_a_head_outside_names_are_relative_to_the_whole(tmp_path: Path) -> None:
    wrapper = nn.ModuleDict({"inner": llama(), "score": nn.Linear(40, 2)})
    ll.inject(wrapper, LoRA(rank=2), targets=["q_proj"], also_train=["score"])
    randomise(wrapper)
    ll.export(wrapper, tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in keys
    assert "base_model.model.inner.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


# -- truncation --------------------------------------------------------------------------------------------------------


def test_truncation_states_what_it_leaves_out(tmp_path: Path) -> None:
    model = adapted(method=Gain(), targets=["q_proj"])
    report = ll.export(model, tmp_path / "out", rank=3)
    path = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(path)
    delta = layer.adapter("default").merged_weight(layer.base.weight).detach() - layer.base.weight
    singular = torch.linalg.svdvals(delta).square()
    assert report.discarded[path] == pytest.approx(float(singular[3:].sum() / singular.sum()), rel=1e-4)
    written = peft_file.read(tmp_path / "out", {}).layers[path].delta().float()
    lost = (written - delta).square().sum() / delta.square().sum()
    assert float(lost) == pytest.approx(report.discarded[path], rel=1e-4)
    assert report.kind == "truncated SVD"
    assert "truncated: 2 layers lose part of their update, most model.layers" in str(report)


def test_a_rank_that_suffices_truncates_nothing(tmp_path: Path) -> None:
    report = ll.export(adapted(), tmp_path / "out", rank=4)
    assert report.kind == "native"
    assert not report.discarded
    report = ll.export(adapted(), tmp_path / "out", rank=2)
    assert len(report.discarded) == 14
    report = ll.export(adapted(method=Gain(), targets=["q_proj"]), tmp_path / "out", rank=99)
    assert not report.discarded or max(report.discarded.values()) < 1e-12


# -- merged models -----------------------------------------------------------------------------------------------------


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


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_unknown_format_rank_and_name(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ExportError, match=r'format is "mergd"\. Did you mean "merged"'):
        ll.export(model, tmp_path, format="mergd")
    for options in ({"rank": 0}, {"rank": 4, "format": "merged"}):
        with pytest.raises(ExportError, match="it must be at least 1, for a format that takes it"):
            ll.export(model, tmp_path, **options)
    with pytest.raises(AdapterStateError, match=r'no adapter "defualt"\. Did you mean "default"'):
        ll.export(model, tmp_path, name="defualt")
    with pytest.raises(AdapterStateError, match="has no adapters"):
        ll.export(llama(), tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_an_input_routed_method_is_refused(format: str, tmp_path: Path) -> None:
    model = adapted(method=Routed(), targets=["q_proj"])
    with pytest.raises(
        ExportError, match=r'Routed on .*q_proj depends on its input: its export class is "not expressible"'
    ):
        ll.export(model, tmp_path / "out", format=format)


def test_no_low_rank_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r'Gain on .* has no exact low-rank form: its export class is "merged only"\. Give rank=N'
    ):
        ll.export(adapted(method=Gain(), targets=["q_proj"]), tmp_path / "out")


def test_parts_of_modules_cannot_be_heads(tmp_path: Path) -> None:
    model = adapted(bert(), also_train=["classifier.bias"])
    with pytest.raises(ExportError, match=r"classifier\.bias trains in full, but is not a whole module"):
        ll.export(model, tmp_path / "out")


def test_bias_on_embeddings_and_values_that_are_not_finite(tmp_path: Path) -> None:
    model = adapted(method=LoRA(rank=2), targets=["embed_tokens", "q_proj"], overrides={"q_proj": {"bias": True}})
    with pytest.raises(ExportError, match="an embedding cannot have it"):
        ll.export(model, tmp_path / "out")
    model = adapted(targets=["q_proj"])
    next(iter(ll.iter_adapters(model)))[1].adapter("default").lora_A.data[0, 0] = float("nan")
    for format, message in (("peft", "the adapter holds values that are not finite"), ("merged", "not finite")):
        before = [layer.base.weight.clone() for _, layer in ll.iter_adapters(model)]
        with pytest.raises(ExportError, match=message):
            ll.export(model, tmp_path / "out", format=format)
        after = [layer.base.weight for _, layer in ll.iter_adapters(model)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4}, "groups=4, and peft lets its factors see all input channels"),
        ({"dilation": 2}, r"dilation=\(2, 2\), which peft drops"),
        ({"padding": 1, "padding_mode": "reflect"}, 'padding_mode="reflect"'),
    ],
)
def test_convolutions_that_peft_computes_otherwise(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **options))
    ll.inject(model, LoRA(rank=2), targets=["0"])
    with pytest.raises(ExportError, match=f"0 cannot travel in peft's format: {message}"):
        ll.export(model, tmp_path / "out")


def test_layers_that_peft_would_not_reach(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    ll.inject(model, LoRA(rank=2), targets=["out_proj"])
    with pytest.raises(ExportError, match="MultiheadAttention reads the weight without calling the layer"):
        ll.export(model, tmp_path / "out")
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    ll.inject(model, LoRA(rank=2), targets=["one"])
    with pytest.raises(ExportError, match="it stands at two too"):
        ll.export(model, tmp_path / "out")


def test_layers_that_peft_takes_for_experts(tmp_path: Path) -> None:
    config = transformers.Glm4MoeConfig(
        vocab_size=40, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8, **SMALL
    )
    model = adapted(transformers.Glm4MoeForCausalLM(config), targets=["layers.0.mlp.up_proj"])
    with pytest.raises(ExportError, match="in this model peft takes the name for the fused experts"):
        ll.export(model, tmp_path / "out")
    ll.export(model, tmp_path / "out", format="merged")


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


def test_a_model_merged_for_good_is_refused(tmp_path: Path) -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    with pytest.raises(ExportError, match="merged with keep_original=False, so its base is gone"):
        ll.export(model, tmp_path / "out")


# -- folders -----------------------------------------------------------------------------------------------------------


def test_only_our_own_exports_are_replaced(tmp_path: Path) -> None:
    model = adapted()
    target = tmp_path / "out"
    target.mkdir()
    ll.export(model, target)
    first = (target / "adapter_model.safetensors").read_bytes()
    randomise(model.model.layers[0].self_attn.q_proj.adapters)
    ll.export(model, target, format="merged")
    assert "config.json" in {path.name for path in target.iterdir()}
    assert not (target / "adapter_model.safetensors").exists()
    assert first
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match=r"holds tokenizer\.json too, which a new one would delete"):
        ll.export(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    model = adapted()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds 1 files that are no export of ours, such as notes\.txt"):
        ll.export(model, tmp_path)
    with pytest.raises(ExportError, match="is a file"):
        ll.export(model, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("stage", ["save_file", "flush", "rename"])
def test_a_failure_leaves_the_old_export(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    ll.export(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    real = Path.rename

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_second(self: Path, to: Path) -> Path:
        return fail() if self.name.endswith(".writing") else real(self, to)

    if stage == "save_file":
        monkeypatch.setattr(peft_export, "save_file", fail)
    elif stage == "flush":
        monkeypatch.setattr(folder, "flush", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(ExportError, match=r"No space left on device\. What was there before is intact"):
        ll.export(randomise(model), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "half").write_text("x")
    ll.export(adapted(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ll.export(adapted(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").is_file()


# -- from an adapter folder --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with two labels in `base`, and an adapter with three in `adapter`; the base's path is relative."""
    monkeypatch.chdir(tmp_path)
    bert(num_labels=2).save_pretrained("base")
    model = transformers.BertForSequenceClassification.from_pretrained(
        "base", num_labels=3, ignore_mismatched_sizes=True
    )
    adapted(model, LoRA(rank=2))
    ll.save_adapter(model, "adapter")
    torch.save(logits(model.eval()), "logits.pt")
    return tmp_path


def test_peft_from_an_adapter_folder(trained: Path) -> None:
    assert read_folder("adapter").base == "base"
    text = export_folder(Path("adapter"), Path("out"), "peft")
    assert text.startswith('peft (native): 12 layers to "out"')
    model = transformers.BertForSequenceClassification.from_pretrained(
        "base", num_labels=3, ignore_mismatched_sizes=True
    )
    ll.import_peft(model, "out")
    torch.testing.assert_close(logits(model.eval()), torch.load("logits.pt"), atol=1e-6, rtol=1e-5)


def test_merged_from_an_adapter_folder(trained: Path) -> None:
    export_folder(Path("adapter"), Path("out"), "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert model.config.num_labels == 3
    torch.testing.assert_close(logits(model), torch.load("logits.pt"), atol=1e-5, rtol=1e-5)


def test_another_path_to_the_base(trained: Path) -> None:
    Path("base").rename("moved")
    with pytest.raises(ExportError, match=r"which cannot be loaded: .* with --pretrained"):
        export_folder(Path("adapter"), Path("out"), "peft")
    export_folder(Path("adapter"), Path("out"), "peft", rank=1, pretrained="./moved")
    with pytest.raises(ExportError, match=r'--pretrained is "\./movd"; no such folder.*Nearest: moved'):
        export_folder(Path("adapter"), Path("out"), "peft", pretrained="./movd")


def test_a_folder_without_a_base_or_of_another_kind(trained: Path) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2), targets=["0"])
    ll.save_adapter(model, "plain")
    with pytest.raises(ExportError, match="does not say which base model it was trained on; give it with --pretrained"):
        export_folder(Path("plain"), Path("out"), "peft")
    with pytest.raises(ExportError, match="trained inside Sequential, which is no class of transformers"):
        export_folder(Path("plain"), Path("out"), "peft", pretrained="base")
    with pytest.raises(AdapterFileError, match=r"holds no adapter\.safetensors"):
        export_folder(Path("base"), Path("out"), "peft")
    with pytest.raises(ExportError, match="format is"):
        export_folder(Path("adapter"), Path("out"), "onnx")


def test_nothing_here_needs_peft_or_lightning() -> None:
    code = (
        "import sys, lora_lightning.exporters.export\n"
        "assert not {'peft', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "others", "expected"),
    [
        (["a.q", "b.q"], ["a.k"], ["q"]),
        (["a.q"], ["b.q", "a.k"], ["a.q"]),
        (["q"], ["a.q"], "q"),
        (["0"], ["1", "1.0"], "0"),
        (["x.a.q"], ["a.q", "y.x.a.q"], r"x\.a\.q"),
    ],
)
def test_target_modules_select_exactly(paths: list[str], others: list[str], expected: str | list[str]) -> None:
    assert peft_rules.targets_for(paths, (), [*paths, *others], experts=False) == expected
    if isinstance(expected, str):
        with pytest.raises(ExportError, match="no target_modules of peft selects exactly"):
            peft_rules.targets_for(paths, (), [*paths, *others], experts=True)


def test_patterns_are_anchored_where_one_path_ends_like_another() -> None:
    assert peft_rules.patterns_for({"a.q": 1, "b.q": 2}, 1) == {"b.q": 2}
    patterns = peft_rules.patterns_for({"q": 1, "b.q": 2, "c.q": 2}, 2)
    assert patterns == {"^q": 1}
    assert [peft_rules.pattern_value(patterns, path, 2) for path in ("q", "b.q")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("WhisperForConditionalGeneration", None),
        ("ViTForImageClassification", None),
        ("BertModel", None),
    ],
)
def test_task_types(name: str, task: str | None) -> None:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        assert peft_rules.task_type(cls(cls.config_class())) == task
