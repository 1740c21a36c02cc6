from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import TargetError
from lora_lightning.injection.targets import select
from lora_lightning.models.anatomy import survey
from lora_lightning.models.scopes import is_scope
from lora_lightning.testing import tiny_encoder

METHOD = LoRA(rank=2)
LANGUAGE = "model.language_model"
VISION = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"


@functools.cache
def model(name: str) -> Any:
    """A model that a test must not change."""
    return ARCHITECTURES[name].build()


def blocks(found: dict[str, Any]) -> set[str]:
    """The first two names of each path."""
    return {".".join(path.split(".")[:2]) for path in found}


# -- which tower is which ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("CLIP", {"text_model": "language", "vision_model": "vision"}),
        ("LLaVA", {VISION: "vision", LANGUAGE: "language", "lm_head": "language"}),
        ("Qwen2.5-VL", {"model.visual": "vision", LANGUAGE: "language", "lm_head": "language"}),
        ("Whisper", {}),
        ("ViT", {}),
        ("Llama", {}),
    ],
)
def test_towers_by_name(name: str, towers: dict[str, str]) -> None:
    assert survey(model(name)).scopes.towers == towers


def tiny(kind: str, **settings: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, kind)(getattr(transformers, kind).config_class(**settings))


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_towers_by_what_they_take() -> None:
    """Neither of its parts has a name that says it."""
    from transformers import BertConfig, VisionEncoderDecoderConfig, ViTConfig

    parts = ViTConfig(**SMALL, image_size=16, patch_size=8), BertConfig(**SMALL, is_decoder=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    scopes = survey(
        tiny("VisionEncoderDecoderModel", encoder=config.encoder.to_dict(), decoder=config.decoder.to_dict())
    ).scopes
    assert scopes.towers == {"encoder": "vision", "decoder": "language"}


def test_a_language_model_around_its_vision_tower() -> None:
    scopes = survey(tiny("GitForCausalLM", **SMALL, vocab_size=32, vision_config={**SMALL, "image_size": 16})).scopes
    assert scopes.towers == {"git.image_encoder": "vision", "": "language"}
    assert scopes.tower("git.image_encoder.vision_model.encoder.layers.0.mlp.fc1") == "vision"
    assert scopes.tower("git.encoder.layer.0.output.dense") == "language"


def test_what_lies_between_towers_is_the_projector() -> None:
    text = {"model_type": "opt", "vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "word_embed_proj_dim": 16}
    blip = tiny(
        "Blip2ForConditionalGeneration",
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
        qformer_config={**SMALL, "encoder_hidden_size": 16, "vocab_size": 32},
        text_config=text,
    )
    scopes = survey(blip).scopes
    assert scopes.towers == {"vision_model": "vision", "language_model": "language"}
    assert scopes.tower("qformer.encoder.layer.0.attention.attention.query") == "projector"
    assert blocks(select(survey(blip), "projector").layers) == {"qformer.encoder", "language_projection"}
    assert scopes.left_out(select(survey(blip), "projector").layers) == {
        "qformer": 'projector, 10 linear layers; the scope "projector" adapts them',
        "language_projection": 'projector, 1 linear layer; the scope "projector" adapts it',
    }


def test_paths_of_a_project_around_the_model() -> None:
    project = nn.ModuleDict({"net": model("LLaVA"), "own": nn.Linear(4, 4)})
    scopes = survey(project).scopes
    assert scopes.towers[f"net.{VISION}"] == "vision"
    assert scopes.tower("own") is None
    found = select(survey(project)).layers
    assert "own" in found
    assert blocks(found) == {"net.model", "own"}
    assert all(f".{VISION}." not in path for path in found)


# -- never the wrong tower by accident ---------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", ["q_proj", "v_proj"], r".*\.(q|v)_proj"])
def test_what_is_said_without_a_tower_is_said_of_the_language_tower(targets: Any) -> None:
    selection = select(survey(model("LLaVA")), targets)
    assert blocks(selection.layers) == {LANGUAGE}
    assert selection.skipped[VISION] == 'vision tower, 6 linear layers; the scope "vision" adapts them'
    assert selection.skipped[PROJECTOR] == 'projector, 2 linear layers; the scope "projector" adapts them'


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("language", {LANGUAGE}),
        ("vision", {VISION}),
        ("projector", {PROJECTOR}),
        (["language", "projector"], {LANGUAGE, PROJECTOR}),
        (["all-linear", "vision"], {LANGUAGE, VISION}),
        (["vision.attention", "language.mlp"], {LANGUAGE, VISION}),
        (["q_proj", "projector"], {LANGUAGE, PROJECTOR}),
        (["linear_1"], {PROJECTOR}),
        (["fc1"], {VISION}),
        (["vision_tower.encoder.layers.0.self_attn.q_proj"], {VISION}),
        (r".*vision_tower.*(q|v)_proj", {VISION}),
        (r".*(vision|language).*q_proj", {VISION, LANGUAGE}),
    ],
)
def test_a_tower_is_reached_by_naming_it(targets: Any, expected: set[str]) -> None:
    selection = select(survey(model("LLaVA")), targets)
    assert blocks(selection.layers) == expected
    assert not any(inside in selection.skipped for inside in expected)


def test_parts_of_towers() -> None:
    found = select(survey(model("LLaVA")), ["vision.attention", "language.mlp"]).layers
    assert {path.split(".")[1] for path in found if "self_attn" in path} == {"vision_tower"}
    assert {path.split(".")[1] for path in found if ".mlp." in path} == {"language_model"}


def test_exclude_takes_scopes_and_names() -> None:
    both = ["language", "vision"]
    assert blocks(select(survey(model("LLaVA")), both, exclude=["vision"]).layers) == {LANGUAGE}
    assert blocks(select(survey(model("LLaVA")), both, exclude=["language_model"]).layers) == {VISION}
    found = select(survey(model("LLaVA")), both, exclude=["vision.mlp", "language.attention"]).layers
    assert {tuple(path.split(".")[1:-1:3]) for path in found} == {("vision_tower", "0"), ("language_model", "mlp")}
    assert len(select(survey(model("Llama")), exclude=["attention"]).layers) == 6


def test_the_report_says_what_was_left_out() -> None:
    report = ll.inject(ARCHITECTURES["PaliGemma"].build(), METHOD)
    assert 'left out: model.vision_tower (vision tower, 12 linear layers; the scope "vision" adapts them)' in str(
        report
    )
    assert 'left out: model.multi_modal_projector (projector, 1 linear layer; the scope "projector"' in str(report)


def test_a_layer_may_be_called_like_a_scope() -> None:
    both = nn.ModuleDict({"projector": nn.Linear(4, 4), "rest": nn.Linear(4, 4)})
    assert list(select(survey(both), ["projector"]).layers) == ["projector"]


@pytest.mark.parametrize("word", ["all-linear", "attention", "mixer", "vision", "vision.mlp", "projector.attention"])
def test_words(word: str) -> None:
    assert is_scope(word)


@pytest.mark.parametrize("word", ["q_proj", "attention.vision", "visual", "vision.linear", ""])
def test_no_words(word: str) -> None:
    assert not is_scope(word)


# -- what would stay untrained -----------------------------------------------------------------------------------------


def test_blocks_behind_the_features_that_are_read_get_no_adapter() -> None:
    """LLaVA reads the output of the last block but one."""
    selection = select(survey(model("LLaVA")), "vision")
    why = "its output is not used: vision_feature_layer is -2"
    assert {path.split(".")[4] for path in selection.layers} == {"0"}
    assert selection.skipped[f"{VISION}.encoder.layers.1.mlp.fc1"] == why
    with pytest.raises(TargetError, match=rf"leaves no layer to adapt; left out: .* \({why}\)"):
        select(survey(model("LLaVA")), ["vision_tower.encoder.layers.1.mlp.fc1"])


@pytest.mark.parametrize(("layer", "unused"), [(-1, 0), (-2, 1), (1, 1), ([0, 2], 0), ([-3, -2], 1)])
def test_how_many_blocks_are_unused(layer: Any, unused: int) -> None:
    """By the gradients that arrive."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    llava = ARCHITECTURES["LLaVA"]
    net = LlavaForConditionalGeneration(LlavaConfig(**{**llava.settings, "vision_feature_layer": layer}))
    assert len(survey(net).scopes.unused) == unused
    net(**llava.batch()).loss.backward()
    idle = [block.mlp.fc1.weight.grad is None for block in net.model.vision_tower.encoder.layers]
    assert sum(idle) == unused


def test_the_pooling_head_of_a_vision_tower_must_be_named() -> None:
    from transformers import SiglipModel

    config = {"vision_config": {**SMALL, "image_size": 16, "patch_size": 8}, "text_config": {**SMALL, "vocab_size": 32}}
    siglip = SiglipModel(SiglipModel.config_class(**config))
    selection = select(survey(siglip), "vision")
    assert all(".head." not in path for path in selection.layers)
    assert selection.skipped["vision_model.head.mlp.fc1"] == "pooler"
    assert list(select(survey(siglip), ["head.mlp.fc1"]).layers) == ["vision_model.head.mlp.fc1"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("BERT", "vision", r'targets="vision" means no linear layer of bert. Its scopes: attention, mlp\.'),
        ("Llama", ["q_proj", "projector"], r'targets="projector" means no linear layer of llama. Its scopes: att'),
        ("Mamba", "attention", r'targets="attention" means no linear layer of mamba. Its scopes: mixer\.'),
        ("LLaVA", "audio", r"Its scopes: attention, mlp, language, vision, projector\."),
        ("LLaVA", "projector.attention", r'targets="projector.attention" means no linear layer of llava'),
        (
            "Gemma 3, vision",
            "projector",
            r"Its scopes: attention, mlp, language, vision\. model.multi_modal_projector.mm_input_projection_weight is "
            r"a bare parameter, not a layer; also_train can name it\.",
        ),
        ("LLaVA", "visoin", r'targets="visoin" is neither .* Did you mean "vision"\?'),
    ],
)
def test_a_scope_that_a_model_has_not(name: str, targets: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        select(survey(model(name)), targets)


def test_a_bare_projector_trains_in_full_where_it_is_named() -> None:
    net = ARCHITECTURES["Gemma 3, vision"].build()
    ll.inject(net, METHOD, also_train=["mm_input_projection_weight"])
    net(**ARCHITECTURES["Gemma 3, vision"].batch()).loss.backward()
    assert net.model.multi_modal_projector.mm_input_projection_weight.grad.any()


@pytest.mark.slow
def test_a_compiled_model_has_the_heads_and_scopes_of_the_model_inside() -> None:
    """torch.compile's wrapper answers for what it wraps, and is no model of transformers itself."""
    plain, compiled = tiny_encoder(), torch.compile(tiny_encoder(), backend="eager")
    expected = ll.inject(plain, LoRA(rank=2), seed=0)
    report = ll.inject(compiled, LoRA(rank=2), seed=0)
    assert [path.removeprefix("_orig_mod.") for path in report.layers] == list(expected.layers)
    assert [name.removeprefix("_orig_mod.") for name in report.trained] == list(expected.trained)
    ids = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(compiled(ids).logits, plain(ids).logits)
