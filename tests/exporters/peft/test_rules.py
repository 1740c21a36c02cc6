from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from exported_models import SMALL, LoRA, adapted
from model_classes import model_class
from peft_models import PEFT_WARNINGS, DoRA, randomise, seeded
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import rules as peft_rules

pytestmark = [
    *PEFT_WARNINGS,
    # peft looks for its patterns among modules alone, and applies them to parameters all the same
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=6)})
    ll.inject(model, LoRA(rank=2), targets=["out_proj"])
    with pytest.raises(ExportError, match="MultiheadAttention reads the weight without calling the layer"):
        ll.export(model, tmp_path / "out")
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    ll.inject(model, LoRA(rank=2), targets=["one"])
    with pytest.raises(ExportError, match="it stands at two too"):
        ll.export(model, tmp_path / "out")


DENSE: dict[str, Any] = {
    "vocab_size": 40, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2, **SMALL,
}  # fmt: skip
MIXED = {
    "GLM-4 MoE": lambda: transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(n_routed_experts=4, n_group=1, topk_group=1, head_dim=8, **DENSE)
    ),
    "ERNIE 4.5": lambda: transformers.Ernie4_5_MoeForCausalLM(
        transformers.Ernie4_5_MoeConfig(moe_num_experts=4, moe_k=2, moe_layer_start_index=1, **DENSE)
    ),
    "AFMoE": lambda: transformers.AfmoeForCausalLM(
        transformers.AfmoeConfig(num_experts=4, num_dense_layers=1, num_shared_experts=1, head_dim=8, **DENSE)
    ),
    "HunYuan": lambda: transformers.HunYuanMoEV1ForCausalLM(
        transformers.HunYuanMoEV1Config(
            num_experts=4, moe_topk=2, head_dim=8, **{k: v for k, v in DENSE.items() if k != "num_experts_per_tok"}
        )
    ),
    "DeepSeek-V3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=4, q_lora_rank=4,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, **DENSE,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("build", MIXED.values(), ids=MIXED)
def test_layers_whose_name_peft_takes_for_experts_travel_as_parameters(build: Any, tmp_path: Path) -> None:
    """Dense and shared MLPs beside fused experts: no target_modules selects them, target_parameters does."""
    model = adapted(seeded(build), LoRA(rank=2), overrides={"down_proj": {"rank": 3, "alpha": 2.0}})
    assert ll.export(model, tmp_path / "out").verified_by.startswith("peft 0.")
    ids = torch.arange(3, 12)[None]
    theirs = peft.PeftModel.from_pretrained(seeded(build), tmp_path / "out").eval()
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    again = seeded(build)
    ll.import_peft(again, tmp_path / "out")
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", [DoRA(rank=2), LoRA(rank=2, bias=True)], ids=["DoRA", "bias"])
def test_what_has_no_place_in_a_parameter_is_refused(method: ll.Method, tmp_path: Path) -> None:
    model = adapted(seeded(MIXED["GLM-4 MoE"]), method, targets=["layers.0.mlp.up_proj"])
    with pytest.raises(ExportError, match=r"peft takes the name for the fused experts, .* no DoRA, no bias"):
        ll.export(model, tmp_path / "out")


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


TIED = [
    "BartForConditionalGeneration",  # everything tied, and named in the class of the whole model
    "BartForSequenceClassification",  # tied by the model inside, which peft does not ask
    "T5ForTokenClassification",
    "MarianMTModel",  # the input's embedding is the encoder's, and `shared` only holds the matrix
    "LlamaForCausalLM",
    "NomicBertForMaskedLM",  # tied, without a word of it in the configuration
    "ProphetNetForCausalLM",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_layers_that_follow_the_rows_of_the_embedding_are_those_that_peft_wraps(name: str, tie: bool) -> None:
    from peft.utils.other import TrainableTokensWrapper

    found = model_class(name)
    config = found.config()
    config.tie_word_embeddings = tie
    model = found.build(config)
    embedding = peft_rules.input_embedding(model)
    assert embedding is not None
    paths = {path: module for path, module in model.named_modules() if "weight" in module._parameters}
    sharing = [path for path, module in paths.items() if module.weight is embedding.weight]
    own = next(path for path in sharing if paths[path] is embedding)
    ours = peft_rules.following_rows(model, sharing)
    anywhere = next(path for path, module in paths.items() if isinstance(module, nn.Linear) and path not in sharing)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=1, target_modules=[anywhere], trainable_token_indices={own: [5]})
    )
    wrapped = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, TrainableTokensWrapper)
    }
    assert wrapped - {own} == set(ours) - {"model.shared", "prophetnet.word_embeddings"}  # which only hold the matrix


def test_an_embedding_with_a_value_of_its_own_beside_the_matrix_is_not_looked_up_plainly() -> None:
    plain = model_class("Gemma3ForCausalLM").build(device="meta").get_input_embeddings()
    special = model_class("T5Gemma2ForTokenClassification").build(device="meta").get_input_embeddings()
    assert peft_rules.looks_up_plainly(plain)
    assert not peft_rules.looks_up_plainly(special)


@pytest.mark.filterwarnings("ignore")
def test_a_type_with_experts_whose_layers_are_all_dense_travels(tmp_path: Path) -> None:
    found = model_class("DeepseekV32ForCausalLM")
    model = found.build()
    ll.inject(model, LoRA(rank=2), targets=["gate_proj", "up_proj", "down_proj"], seed=0)
    randomise(model)
    assert ll.export(model, tmp_path / "out").verified_by.startswith("peft 0.")
