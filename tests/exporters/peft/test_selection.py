"""Which layers a configuration selects, compared with peft; files that lack one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from peft.tuners.lora import LoraLayer
from peft_models import PEFT_WARNINGS, change_tensors, llama, seeded
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.selection import dead_settings, expected_modules

pytestmark = PEFT_WARNINGS


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


SELECTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "names": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "a pattern": (llama, {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "all linear of Conv1D": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "all linear beside a classifier": (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "some excluded": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "excluded by a pattern": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*0.*v_proj"}),
    "some blocks": (bert, {"target_modules": ["query", "dense"], "layers_to_transform": [0, 2]}),
    "one block": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "blocks of a list": (bert, {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "blocks of two lists": (
        bert,
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": ["block", "layer"]},
    ),
    "a whole path in another block": (
        llama,
        {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
    ),
    "beside what is saved whole": (llama, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.1"]}),
}


@pytest.mark.parametrize(("build", "options"), SELECTIONS.values(), ids=SELECTIONS)
def test_the_same_layers_as_peft(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = build()
    modules = dict(model.named_modules())
    expected = expected_modules(options, model, modules)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**options))
    found = {name for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    assert {f"base_model.model.{path}" for path in expected or ()} == found
    theirs.save_pretrained(tmp_path)
    ll.import_peft(build(), tmp_path)


def test_without_target_modules_nothing_is_known() -> None:
    assert expected_modules({}, llama(), {}) is None
    assert expected_modules({"target_parameters": ["experts.down_proj"]}, llama(), {}) == set()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("layers.1", r"no factors for 2 layers that its adapter_config\.json selects: .*layers\.1\.self_attn\.q_proj"),
        ("0.self_attn.v_proj", r"no factors for 1 layers .* selects: model\.layers\.0\.self_attn\.v_proj"),
        ("q_proj", "no factors for 2 layers"),
    ],
)
def test_a_file_that_was_saved_in_part_is_refused(lost: str, message: str, saved: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if lost in key]:
            del tensors[key]

    change_tensors(saved, drop)
    model = llama()
    with pytest.raises(AdapterFileError, match=message):
        ll.import_peft(model, saved)
    assert not list(ll.iter_adapters(model))


def test_what_decides_nothing_is_named() -> None:
    config = {"target_modules": ["q", "x"], "rank_pattern": {"q": 2, "a.q": 3}, "alpha_pattern": {"^q": 1}}
    assert [note.partition(" ")[2] for note in dead_settings(config, ["a.q", "b.q"])] == [
        'names "x", which no tensor of the file belongs to.',
        'has "a.q", which decides nothing about any layer of the file',
        'has "^q", which decides nothing about any layer of the file',
    ]
    assert dead_settings({"target_modules": ".*q"}, ["a.q"]) == ()
