from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported_models import SMALL, LoRA, adapted
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import rules as peft_rules


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
