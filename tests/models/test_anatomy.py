"""The survey: what it finds, that it stays what it was, and how often operations walk a whole model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.cli.verbs import targets as targets_verb
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, add_rows
from lora_lightning.testing import TinyMLP, tiny_decoder, tiny_encoder

LoRA = ll.method("LoRA")
CORE = str(Path(ll.__file__).parent)
WALKS = ("modules", "named_modules", "parameters", "named_parameters", "buffers", "named_buffers", "state_dict")
LARGE = 0.5
"""Of the modules of the model; walks over more than this fraction count."""


def size(module: nn.Module) -> int:
    return 1 + sum(size(child) for child in module._modules.values() if child is not None)


@contextlib.contextmanager
def counting(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts walks over large parts of a model that core itself begins; walks inside torch's and others' do not count.

    Lists, adapters and single layers are far smaller, and a loaded copy of the model is as large.
    """
    found: Counter[str] = Counter()
    large = LARGE * size(model)

    def counted(name: str, walk: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(walk)
        def wrapper(module: nn.Module, *args: Any, **options: Any) -> Any:
            ours = sys._getframe(1).f_code.co_filename.startswith(CORE)
            if ours and options.get("recurse", True) and size(module) > large:
                found[name] += 1
            return walk(module, *args, **options)

        return wrapper

    with monkeypatch.context() as patch:
        for name in WALKS:
            patch.setattr(nn.Module, name, counted(name, getattr(nn.Module, name)))
        yield found


def test_the_count_sees_walks_of_core_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_encoder()
    with counting(model, monkeypatch) as walks:
        survey(model)
        list(model.named_modules())
    assert walks == {"named_modules": 1}


def test_no_operation_walks_a_model_more_than_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, third = tiny_encoder(), tiny_encoder(), tiny_encoder()
    operations = {
        "inject": lambda: ll.inject(model, LoRA(rank=2), seed=0),
        "save": lambda: ll.save_adapter(model, tmp_path / "adapter"),
        "load": lambda: ll.load_adapter(other, tmp_path / "adapter"),
        "load again": lambda: ll.load_adapter(other, tmp_path / "adapter"),
        "delta": lambda: ll.export(model, tmp_path / "delta", "delta"),
        # peft, which opens what was written, walks as it likes
        "peft": lambda: ll.export(model, tmp_path / "peft", "peft", verify=False),
        "merged": lambda: ll.export(model, tmp_path / "merged", "merged"),
        "import_peft": lambda: ll.import_peft(third, tmp_path / "peft"),
    }
    for name, operation in operations.items():
        with counting(model, monkeypatch) as walks:
            operation()
        limit = 4 if name == "import_peft" else 3  # what was read is looked up anew, under all names of a module
        assert 0 < walks.total() <= limit, f"{name}: {dict(walks)}"


def test_the_targets_verb_walks_the_model_three_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config=lora", "--model.pretrained=random:bert", "--model.num_labels=4"]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    flags += [f"--model.random_config={small}"]
    with counting(tiny_encoder(), monkeypatch) as walks:
        targets_verb.run(argparse.Namespace(flags=flags))
    assert "LoRA on 12 layers" in capsys.readouterr().out
    assert 0 < walks.total() <= 3, dict(walks)


def test_it_agrees_with_torch_on_modules_and_parameters() -> None:
    model = tiny_decoder(tied=True)
    model.register_module("again", model.model.layers[0])
    ll.inject(model, LoRA(rank=2), ["q_proj"], seed=0)
    anatomy = survey(model)
    assert dict(model.named_modules()) == anatomy.modules
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in anatomy.parameters.items()}
    assert anatomy.modules[""] is model
    standing = anatomy.places[id(model.model.layers[0])]
    assert {(id(parent), name) for parent, name in standing} == {(id(model), "again"), (id(model.model.layers), "0")}


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        survey(TinyMLP()).modules = {}  # type: ignore[misc]


def test_layers_are_those_that_adapters_are_on_and_nothing_inside() -> None:
    model = TinyMLP()
    first = model.first
    ll.inject(model, LoRA(rank=2), ["first"], seed=0)
    anatomy = survey(model)
    assert anatomy.layers["first"].module is first
    assert anatomy.layers["first"].base is anatomy.adapted["first"].base_layer
    assert not [path for path in anatomy.layers if path.startswith("first.")]
    assert set(anatomy.adapted) == {"first"}


def test_a_survey_from_before_stays_as_it_was() -> None:
    model = TinyMLP()
    before = survey(model)
    first = model.first
    ll.inject(model, LoRA(rank=2), ["first"], seed=0)
    assert before.adapted == {}
    assert before.modules["first"] is first
    assert isinstance(survey(model).modules["first"], AdaptedLayer)
    with torch.no_grad():
        first.weight.zero_()
    assert not before.parameters["first.weight"].any()


def test_users_of_a_tied_weight() -> None:
    anatomy = survey(tiny_decoder(tied=True))
    assert anatomy.tied({"lm_head": anatomy.adaptable["lm_head"]}) == {"lm_head": ("model.embed_tokens",)}
    untied = survey(tiny_decoder())
    assert untied.tied({"lm_head": untied.adaptable["lm_head"]}) == {}


def test_rows_of_new_tokens_are_known_after_they_were_added() -> None:
    model = tiny_decoder(tied=True)
    before = survey(model)
    add_rows(model, Vocabulary(("<a>", "<b>"), len(model.get_input_embeddings().weight)))
    after = survey(model)
    assert before.extended == {}
    assert set(after.extended) == {"model.embed_tokens", "lm_head"}
    assert after.row_names == ["model.embed_tokens.new_rows"]
    assert after.layers["lm_head"].base is None


def test_heads_and_what_patterns_must_name() -> None:
    anatomy = survey(tiny_encoder())
    assert anatomy.heads == ["classifier", "bert.pooler"]
    assert anatomy.protected == {"classifier": "head", "dropout": "head", "bert.pooler": "pooler"}
    assert survey(tiny_decoder()).output_layers == ["lm_head"]


def test_bytes_of_what_is_frozen() -> None:
    model = TinyMLP().double()
    ll.inject(model, LoRA(rank=2), seed=0)
    base = sum(p.numel() for p in TinyMLP().parameters())
    assert survey(model).frozen_bytes == 8 * base
