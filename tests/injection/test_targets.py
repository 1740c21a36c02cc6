from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_models import METHOD, tiny_moe
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import ExportError, TargetError
from lora_lightning.injection.records import adapters_named
from lora_lightning.injection.targets import select
from lora_lightning.models.anatomy import survey
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder, tiny_encoder
from lora_lightning.testing.toy_models import seeded
from lora_lightning.training.module import AdapterModule

BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


BERT = [f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in BLOCK]


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    with seeded(0):
        return GPT2LMHeadModel(config).eval()


class TheirExperts(nn.Module):
    """Stacked matrices of unknown orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.ones(2, 4, 4))


def unknown_layout() -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(4, 4), "experts": TheirExperts()})


class SparseBlock(nn.Module):
    """Experts as separate layers, routed by a plain linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.shared_expert_gate = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)) + x


def test_all_linear_is_the_backbone() -> None:
    selection = select(survey(tiny_encoder()))
    assert list(selection.layers) == BERT
    assert selection.skipped == {"bert.pooler.dense": "pooler", "classifier": "head"}
    assert {base.kind for base in selection.layers.values()} == {"linear"}


def test_all_linear_on_gpt2_finds_transposed_layers_and_leaves_the_tied_head() -> None:
    selection = select(survey(tiny_gpt2()))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(selection.layers) == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in names]
    assert selection.skipped == {"lm_head": "head"}
    base = selection.layers["transformer.h.0.attn.c_attn"]
    assert (base.d_in, base.d_out) == (16, 48)


def test_all_linear_on_llama() -> None:
    selection = select(survey(tiny_decoder()))
    assert len(selection.layers) == 14
    assert selection.skipped == {"lm_head": "head"}


def test_all_linear_on_plain_torch_is_everything() -> None:
    assert list(select(survey(TinyMLP())).layers) == ["first", "second"]


@pytest.mark.parametrize(
    ("make", "scope", "ends"),
    [
        (tiny_encoder, "attention", {"query", "key", "value", "attention.output.dense"}),
        (tiny_encoder, "mlp", {"intermediate.dense", "output.dense"}),
        (tiny_gpt2, "attention", {"attn.c_attn", "attn.c_proj"}),
        (tiny_gpt2, "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        (tiny_decoder, "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (tiny_decoder, "mlp", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_scopes(make: Any, scope: str, ends: set[str]) -> None:
    layers = select(survey(make()), scope).layers
    assert len(layers) == 2 * len(ends)
    assert all(path.endswith(tuple(ends)) for path in layers)
    assert all(("attention" in path or "attn" in path) == (scope == "attention") for path in layers)


def test_scope_of_unfused_experts_leaves_their_router() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([SparseBlock()])})
    assert list(select(survey(model), "experts").layers) == ["blocks.0.experts.0", "blocks.0.experts.1"]
    everything = select(survey(model))
    assert list(everything.layers) == ["blocks.0.experts.0", "blocks.0.experts.1"]
    assert everything.skipped == {"blocks.0.gate": "router", "blocks.0.shared_expert_gate": "router"}
    assert list(select(survey(model), ["gate"]).layers) == ["blocks.0.gate"]


def test_suffixes_regular_expressions_and_embeddings() -> None:
    model = tiny_encoder()
    assert list(select(survey(model), ["query", "value"]).layers) == [p for p in BERT if p.endswith(("query", "value"))]
    assert list(select(survey(model), ["output.dense"]).layers) == [p for p in BERT if p.endswith("output.dense")]
    assert list(select(survey(model), r".*layer\.1\..*(query|key)").layers) == [
        p for p in BERT if "1" in p and p[-3:] in ("ery", "key")
    ]
    embedding = select(survey(model), ["word_embeddings"]).layers
    assert [base.kind for base in embedding.values()] == ["embedding"]


def test_a_pattern_reaches_heads_and_poolers_only_by_naming_them() -> None:
    model = tiny_encoder()
    assert "bert.pooler.dense" not in select(survey(model), ["dense"]).layers
    assert select(survey(model), ["dense"]).skipped == {"bert.pooler.dense": "pooler"}
    assert list(select(survey(model), ["pooler.dense"]).layers) == ["bert.pooler.dense"]
    assert list(select(survey(model), ["classifier"]).layers) == ["classifier"]
    assert list(select(survey(tiny_decoder()), ["lm_head"]).layers) == ["lm_head"]


def test_exclude_takes_parts_of_names_and_regular_expressions() -> None:
    model = tiny_encoder()
    selection = select(survey(model), exclude=["layer.0", r".*value"])
    assert list(selection.layers) == [p for p in BERT if "layer.1" in p and not p.endswith("value")]
    assert selection.skipped["bert.encoder.layer.0.output.dense"] == "excluded"
    assert list(select(survey(model), exclude="layer.0").layers) == [p for p in BERT if "layer.1" in p]


def test_overrides_by_layer_the_later_wins() -> None:
    model = tiny_encoder()
    overrides = {"layer.1": {"rank": 4, "alpha": 2.0}, "query": {"alpha": 3.0}, r".*layer\.0\..*key": {"rank": 1}}
    ll.inject(model, METHOD, ["query", "key"], overrides=overrides)
    found = {
        path.removeprefix("bert.encoder.layer."): (pair.lora_A.shape[0], pair.scaling)
        for path, adapter in adapters_named(model, "default").items()
        for pair in adapter.factor_pairs()
    }
    assert found == {
        "0.attention.self.query": (2, 1.5),
        "0.attention.self.key": (1, 4.0),
        "1.attention.self.query": (4, 0.75),
        "1.attention.self.key": (4, 0.5),
    }


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            tiny_gpt2,
            {"targets": ["c_atn"]},
            r'targets=\["c_atn"\] matched none of the 11 adaptable layers of gpt2. Nearest: "c_attn" \(2 layers\)\.',
        ),
        (
            tiny_encoder,
            {"targets": "atention"},
            r'targets="atention" is neither "all-linear" nor a scope .*mean "attention"',
        ),
        (tiny_encoder, {"targets": "query"}, r'targets="query" is neither .* For a name suffix write \["query"\]'),
        (tiny_encoder, {"targets": r".*\.qery"}, r"targets='.*' matched none of the 17 adaptable layers of bert"),
        (tiny_encoder, {"targets": "*.query"}, r'targets: "\*\.query" is neither a part of a name nor a regular exp'),
        (tiny_encoder, {"targets": []}, r"targets is empty; name at least one layer"),
        (
            tiny_encoder,
            {"targets": ["query", "attention.output"]},
            r'targets=\["attention.output"\] matched none .* "attention.output" is a block; its layers are: dense\.',
        ),
        (
            tiny_encoder,
            {"targets": ["LayerNorm"]},
            r'"LayerNorm" names bert.embeddings.LayerNorm \(LayerNorm\), a kind of module that takes no adapter',
        ),
        (tiny_encoder, {"exclude": ["qery"]}, r'exclude=\["qery"\] matched none .* Nearest: "query" \(2 layers\)'),
        (
            tiny_encoder,
            {"exclude": ["(query"]},
            r'pattern: "\(query" is neither a part of a name nor a regular expression',
        ),
        (
            tiny_encoder,
            {"targets": ["query"], "exclude": ["attention"]},
            r"leaves no layer to adapt; left out: bert.encoder.layer.0.attention.self.query \(excluded\)",
        ),
        (
            tiny_encoder,
            {"overrides": {"qery": {"rank": 1}}},
            r'overrides: "qery" matches none of the 12 adapted layers. Did you mean "query"\?',
        ),
        (
            tiny_encoder,
            {"also_train": ["clasifier"]},
            r'also_train: "clasifier" matches no parameter outside adapted layers. Nearest: classifier',
        ),
        (
            tiny_encoder,
            {"targets": ["query", "classifier"]},
            r"classifier would be adapted and trained in full; exclude it, or take it out of also_train",
        ),
        (tiny_moe, {"targets": ["mlp.experts"]}, r'"mlp.experts" is a block; its layers are: down_proj, gate_up_proj'),
        (
            unknown_layout,
            {},
            r"1 fused expert tensors, such as experts.w1, but TheirExperts does not say .* exclude=\[\"experts.w1\"\]",
        ),
        (unknown_layout, {"targets": ["w1"]}, r"targets=\['w1'\] means 1 fused expert tensors"),
        (unknown_layout, {"targets": "experts"}, r"targets='experts' means 1 fused expert tensors"),
        (
            tiny_moe,
            {"targets": ["norm"]},
            r'"norm" names model.norm \(Qwen3MoeRMSNorm\), a kind of module .* also_train=\["model.norm"\]',
        ),
        (
            tiny_gpt2,
            {"targets": ["wte", "lm_head"]},
            r"transformer.wte and lm_head share one weight; adapt one of them",
        ),
    ],
)
def test_error_messages_and_an_untouched_model(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TargetError, match=message):
        ll.inject(model, METHOD, **options)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_fused_experts_stay_frozen_where_that_is_said() -> None:
    model = tiny_moe()
    assert survey(model).fused == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    ll.inject(model, METHOD, exclude=["experts"])
    paths = list(adapters_named(model, "default"))
    assert len(paths) == 2 * 4 + 3
    assert not any("experts" in path or path.endswith(".gate") for path in paths)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("experts" in name or ".gate." in name for name in trained)


def test_scopes_of_a_mixture() -> None:
    model = tiny_moe()
    tensors = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    assert len(select(survey(model), "attention").layers) == 8
    assert list(select(survey(model), "experts").layers) == tensors
    assert list(select(survey(model), "mlp").layers) == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert set(tensors) <= set(select(survey(model)).layers)
    assert select(survey(model), ["experts.down_proj"]).layers[tensors[1]].kind == "experts"


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_module_used_in_two_places_is_adapted_in_both() -> None:
    model, x = Twice(), torch.randn(3, 4)
    report = ll.inject(model, METHOD)
    assert report.tied == {}
    assert model.first is model.second
    perturb(model.first.adapters)
    weight = model.first.weight
    bias = model.first.bias
    expected = torch.tanh(x @ weight.T + bias) @ weight.T + bias
    torch.testing.assert_close(model(x), expected)
    ll.merge(model)
    torch.testing.assert_close(model(x), expected)
    ll.eject(model)
    assert model.first is model.second
    assert isinstance(model.second, nn.Linear)
    assert torch.equal(model(x), Twice()(x))


@pytest.mark.parametrize("also_train", ["heads", "all"])
def test_no_layer_is_adapted_and_the_rest_trains_alone(tmp_path: Any, also_train: Any) -> None:
    """A head alone, and full fine-tuning, are saved, loaded and taken back as adapters are."""
    model, plain = tiny_encoder(), tiny_encoder()
    report = ll.inject(model, METHOD, "none", also_train=also_train)
    assert report.layers == {}
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [name for name, _ in plain.named_parameters()]
    assert training == (
        names if also_train == "all" else [name for name in names if "encoder" not in name and "embed" not in name]
    )
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.1 * (number + 1))
    ll.save_adapter(model, tmp_path / "adapter")
    ll.load_adapter(plain, tmp_path / "adapter")
    assert all(torch.equal(model.state_dict()[name], plain.state_dict()[name]) for name in names)
    with pytest.raises(ExportError, match=r'no layer is adapted, .*format="merged" writes the model'):
        ll.export(model, tmp_path / "peft", format="peft")


@pytest.mark.parametrize("targets", [[], ""])
def test_empty_targets_are_no_default(targets: Any) -> None:
    with pytest.raises(TargetError, match=r"targets"):
        ll.inject(tiny_encoder(), METHOD, targets)
    module = AdapterModule("somewhere", METHOD, targets=targets)
    assert module.targets == targets
