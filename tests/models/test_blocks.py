"""Which block a layer lies in, on models of different makes."""

from __future__ import annotations

from torch import nn

from lora_lightning.injection.targets import select
from lora_lightning.models.anatomy import survey
from lora_lightning.models.blocks import Block, blocks_of, same_place_before
from lora_lightning.testing import TinyMLP, tiny_encoder


def test_layers_of_an_encoder_lie_in_its_blocks():
    model = tiny_encoder()
    found = blocks_of(model, select(survey(model), "all-linear", ()).layers)
    for path, block in found.items():
        number = int(path.split("layer.")[1][0])
        assert block == Block(f"bert.encoder.layer.{number}", "bert.encoder.layer", number, 2)
    assert len({block.path for block in found.values()}) == 2


def test_blocks_without_an_asked_layer_do_not_count():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(12))
    found = blocks_of(model, ["layers.11.a", "layers.2.b", "layers.11.b"])
    assert found["layers.2.b"] == Block("layers.2", "layers", 0, 2)
    assert found["layers.11.a"] == found["layers.11.b"] == Block("layers.11", "layers", 1, 2)


def test_stacks_are_counted_one_by_one_and_lists_inside_a_block_are_part_of_it():
    expert = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.ModuleDict({"down": nn.ModuleList([nn.ModuleDict({"experts": expert})]), "up": nn.ModuleList([expert])})
    found = blocks_of(model, ["down.0.experts.1", "up.0.0"])
    assert found == {
        "down.0.experts.1": Block("down.0", "down", 0, 1),
        "up.0.0": Block("up.0", "up", 0, 1),
    }


def test_layers_in_no_list_are_blocks_of_their_own():
    found = blocks_of(TinyMLP(), ["first", "second"])
    assert found == {"first": Block("first", None, 0, 2), "second": Block("second", None, 1, 2)}


def test_a_model_that_is_a_list_is_a_stack():
    found = blocks_of(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), ["0", "1"])
    assert found["1"] == Block("1", "", 1, 2)


def test_layers_at_the_same_place_before_come_nearest_first():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(12))
    model.pooler, model.head = nn.Linear(2, 2), nn.Linear(2, 2)
    asked = ["layers.0.a", "layers.2.a", "layers.2.b", "layers.10.a", "pooler", "head"]
    assert same_place_before(model, asked) == {
        "layers.0.a": [],
        "layers.2.a": ["layers.0.a"],
        "layers.2.b": [],
        "layers.10.a": ["layers.2.a", "layers.0.a"],
        "pooler": [],
        "head": [],
    }
