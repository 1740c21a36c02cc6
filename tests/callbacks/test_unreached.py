from __future__ import annotations

import pytest
import torch
from class_cells import IDS
from model_classes import model_class
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.callbacks.unreached import exclude_for, layers_of, leave_out, unreached
from lora_lightning.models.paths import within


def test_a_layer_counts_where_none_of_its_name_is_reached() -> None:
    reached = {f"layers.{i}.{name}": i == 1 and name == "up" for i in range(3) for name in ("up", "gate")}
    assert unreached(reached) == [f"layers.{i}.gate" for i in range(3)]
    assert unreached({"experts.expert_0.up": False, "experts.expert_11.up": True}) == []


@pytest.mark.parametrize(
    ("lost", "kept", "expected"),
    [
        (["a.0.cross.q", "a.0.cross.k", "a.1.cross.q"], ["a.0.self.q", "a.0.self.k"], ["cross"]),
        (["a.0.self.q", "a.1.self.q"], ["a.0.self.k", "a.0.cross.q"], ["self.q"]),
        (["a.0.q", "pooler"], ["a.1.q"], ["pooler", "a.0.q"]),
        (["a.1"], ["a.1.q"], ["a.1"]),
        (["x.q", "y.k"], ["x.k", "y.q"], ["y.k", "x.q"]),
    ],
)
def test_the_shortest_names_that_leave_them_out(lost: list[str], kept: list[str], expected: list[str]) -> None:
    assert exclude_for(lost, kept) == expected


def test_every_lost_path_is_named_and_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    paths = [
        f"m.{i}.{block}.{name}" for i in range(3) for block in ("self", "cross", "mlp") for name in ("q", "k", "o")
    ]
    for _ in range(20):
        lost = [path for path in paths if torch.rand((), generator=generator) < 0.5]
        kept = [path for path in paths if path not in lost]
        found = exclude_for(lost, kept)
        assert all(any(within(name, path) for name in found) for path in lost)
        assert not any(within(name, path) for name in found for path in kept)


def test_nothing_is_said_where_nothing_would_be_left() -> None:
    assert leave_out(["a"], []) == leave_out([], ["a"]) == ""


@pytest.mark.parametrize("name", ["BartForCausalLM", "LukeForMaskedLM"])
def test_what_is_pasted_leaves_a_model_without_lost_layers(name: str) -> None:
    """The attention to an encoder that is not given; entities that are not given."""
    found = model_class(name)
    model = found.build()
    ll.inject(nn.ModuleDict({"net": model}), LoRA(rank=1), seed=0)

    def lost(module: nn.Module) -> tuple[list[str], list[str]]:
        module(**found.batch(module, IDS)).logits.sum().backward()
        layers = layers_of(module, [name for name, p in module.named_parameters() if p.requires_grad])
        has = {path: any(module.get_parameter(n).grad is not None for n in own) for path, own in layers.items()}
        return unreached(has), [path for path in has if has[path]]

    first, kept = lost(model)
    assert first
    again = found.build()
    ll.inject(again, LoRA(rank=1), exclude=exclude_for(first, kept), seed=0)
    assert lost(again)[0] == []
