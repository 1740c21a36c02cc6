"""Heads, tied weights and trained biases of a file of peft's, in any dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_models import PEFT_WARNINGS, change_tensors, from_peft, llama, seeded
from safetensors.torch import load_file
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft import rules

pytestmark = PEFT_WARNINGS
IDS = torch.arange(3, 12)[None]
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def bert(kind: str = "SequenceClassification") -> nn.Module:
    cls = getattr(transformers, f"BertFor{kind}")
    return seeded(lambda: cls(transformers.BertConfig(num_labels=3, **CONFIG)))


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **{**CONFIG, "vocab_size": 1})
    return seeded(lambda: transformers.ViTForImageClassification(config))


HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "tokens": (lambda: bert("TokenClassification"), {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "answers": (lambda: bert("QuestionAnswering"), {"target_modules": ["query"], "task_type": "QUESTION_ANS"}),
    "images": (vit, {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}),
    "output layer": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]}),
    "embedding": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("build", "options"), HEADS.values(), ids=HEADS)
def test_a_head_is_what_the_file_says_in_any_dtype(
    build: Any, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    from_peft(build, tmp_path, **options)
    model = build().to(dtype)
    report = ll.import_peft(model, tmp_path)
    heads = {k: v for k, v in load_file(tmp_path / rules.TENSORS).items() if ".lora_" not in k}
    assert heads
    for key, value in heads.items():
        name = key.removeprefix(rules.PREFIX)
        own = model.get_parameter(name)
        assert torch.equal(own, value.to(own.dtype)), name
        assert own.requires_grad, name
        assert own.dtype == torch.promote_types(dtype, torch.float32)
    assert set(report.trained) == {key.removeprefix(rules.PREFIX) for key in heads}


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def test_two_tensors_for_one_tied_parameter_that_differ(tmp_path: Path) -> None:
    theirs = from_peft(tied, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = tied()
    with pytest.raises(
        AdapterFileError, match=r"carries (.*lm_head\.weight.*embed|.*embed.*lm_head).*, which differ, while"
    ):
        ll.import_peft(model, tmp_path)
    assert not list(ll.iter_adapters(model))
    untied = llama()  # the way out that the message names; both matrices come from the file
    ll.import_peft(untied, tmp_path)
    torch.testing.assert_close(untied.eval()(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_equal_tensors_for_one_tied_parameter(dtype: torch.dtype, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    from_peft(tied, tmp_path, **options)
    model = tied().to(dtype)
    report = ll.import_peft(model, tmp_path)
    value = load_file(tmp_path / rules.TENSORS)[f"{rules.PREFIX}lm_head.weight"]
    assert torch.equal(model.lm_head.weight, value)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert set(report.trained) == {"model.embed_tokens.weight"}


WEIGHT_TYING: dict[str, dict[str, Any]] = {
    "nothing tied is adapted": {"target_modules": ["q_proj"]},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "the output layer": {"target_modules": ["lm_head", "q_proj"]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
@pytest.mark.parametrize("build", [tied, llama])
@pytest.mark.parametrize("options", WEIGHT_TYING.values(), ids=WEIGHT_TYING)
def test_ensure_weight_tying_is_read(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = from_peft(build, tmp_path, ensure_weight_tying=True, **options)
    model = build()
    ll.import_peft(model, tmp_path)
    torch.testing.assert_close(model.eval()(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def randomised_biases(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": "all", "lora_bias": True},
        {"bias": "all", "task_type": "SEQ_CLS"},
        {"bias": "lora_only", "target_modules": ["query", "dense"]},
    ],
    ids=str,
)
def test_biases_that_trained_are_read_and_train_on(options: dict[str, Any], half: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return randomised_biases(bert())

    theirs = from_peft(build, tmp_path, **{"target_modules": ["query"], **options})
    model = build().to(torch.bfloat16) if half else build()
    report = ll.import_peft(model, tmp_path)
    if half:
        stored = load_file(tmp_path / rules.TENSORS)
        name = "bert.encoder.layer.0.attention.self.query"
        layer = model.get_submodule(name)
        total = layer.adapter("default").merged_bias(layer.originals()["bias"].float())
        wanted = stored[f"{rules.PREFIX}{name}.base_layer.bias"]
        if options.get("lora_bias"):
            wanted = wanted + 1.5 * stored[f"{rules.PREFIX}{name}.lora_B.bias"]
        torch.testing.assert_close(total, wanted)
    else:
        torch.testing.assert_close(model.eval()(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
        own = {key.removeprefix(rules.PREFIX) for key in load_file(tmp_path / rules.TENSORS) if ".lora_" not in key}
        odd = ("base_layer", "modules_to_save", "original_module")  # in the adapter, or written again
        assert set(report.trained) == {key for key in own if not any(part in key for part in odd)}


def test_biases_that_are_missing_or_not_trainable(tmp_path: Path) -> None:
    from_peft(bert, tmp_path, target_modules=["query"], bias="lora_only")
    change_tensors(tmp_path, lambda t: [t.pop(key) for key in list(t) if "1.attention.self.query.base_layer" in key])
    with pytest.raises(
        AdapterFileError, match=r"has trained biases, but lacks that of .*layer\.1\.attention\.self\.query"
    ):
        ll.import_peft(bert(), tmp_path)
    from_peft(bert, tmp_path / "dora", target_modules=["query"], bias="lora_only", use_dora=True)
    with pytest.raises(AdapterFileError, match=r"trained the bias of .*query, which DoRA cannot.*merge_and_unload"):
        ll.import_peft(bert(), tmp_path / "dora")


def test_a_resized_vocabulary_says_what_to_call(tmp_path: Path) -> None:
    def resized() -> nn.Module:
        model = llama()
        model.resize_token_embeddings(44, mean_resizing=False)
        return model

    theirs = from_peft(
        resized, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    with pytest.raises(AdapterFileError, match=r"call model\.resize_token_embeddings\(44\) first"):
        ll.import_peft(llama(), tmp_path / "whole")
    model = resized()
    ll.import_peft(model, tmp_path / "whole")
    torch.testing.assert_close(model.eval()(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    from_peft(resized, tmp_path / "adapted", target_modules=["embed_tokens"])
    with pytest.raises(AdapterFileError, match=r"the layer needs|resize_token_embeddings\(44\)"):
        ll.import_peft(llama(), tmp_path / "adapted")


def test_both_sides_of_a_tied_weight_are_adapted_and_exported(tmp_path: Path) -> None:
    theirs = from_peft(tied, tmp_path / "theirs", target_modules=["embed_tokens", "lm_head"])
    model, again = tied(), tied()
    ll.import_peft(model, tmp_path / "theirs")
    ll.export(model, tmp_path / "ours")
    ll.import_peft(again, tmp_path / "ours")
    torch.testing.assert_close(again.eval()(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_head_of_other_classes_says_how_to_load_the_model(tmp_path: Path) -> None:
    from lora_lightning.testing import tiny_encoder

    model = tiny_encoder(3)
    ll.inject(model, ll.method("LoRA")(rank=2), ["query"])
    ll.save_adapter(model, tmp_path / "own")
    ll.export(model, tmp_path / "peft")
    said = r"has shape \(3,.*the model needs \(5,.*load the model with num_labels=3\.$"
    for read, folder in ((ll.load_adapter, "own"), (ll.import_peft, "peft")):
        with pytest.raises(AdapterFileError, match=said):
            read(tiny_encoder(5), tmp_path / folder)
        read(tiny_encoder(3, seed=0), tmp_path / folder)
