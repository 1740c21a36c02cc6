from __future__ import annotations

import pytest
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback

from lora_lightning import plugins
from lora_lightning.cli.parser import class_paths, method_from_yaml, parser_of
from lora_lightning.errors import PluginError
from lora_lightning.methods import Method


def test_class_paths_come_with_their_keys_outer_ones_first():
    settings = {
        "model": {"method": {"class_path": "One", "init_args": {"inner": {"class_path": "Two"}, "rank": 2}}},
        "trainer": {"callbacks": [{"class_path": "Three"}, {"class_path": "Four", "init_args": None}]},
        "data": {"class_path": None},
    }
    assert list(class_paths(settings)) == [
        ("model.method", "One"),
        ("model.method.init_args.inner", "Two"),
        ("trainer.callbacks", "Three"),
        ("trainer.callbacks", "Four"),
    ]


def test_a_method_of_yaml():
    plugins.load()
    method = method_from_yaml("method: {class_path: LoRA, init_args: {rank: 3}}")
    assert method == plugins.method("LoRA")(rank=3)


def test_a_parser_of_some_settings_raises():
    plugins.load()
    parser = parser_of({"method": Method, "callbacks": list[Callback] | None})
    parsed = parser.parse_object({"method": "LoRA", "callbacks": ["KeepBest"]})
    assert [path for _, path in class_paths(parsed.as_dict())] == ["ll_lora.LoRA", "lora_lightning.callbacks.KeepBest"]
    with pytest.raises(ArgumentError, match="Expected a dot import path string: LoRAX"):
        parser.parse_object({"method": "LoRAX"})


def test_classes_of_blocked_plugins_are_refused_by_their_key():
    plugins.load(["ll_rose"])
    try:
        with pytest.raises(PluginError, match=r"^method: ll_rose.RoseLoRA is part of plugin ll_rose, which is blocked"):
            parser_of({"method": Method}).parse_args(["--method", "ll_rose.RoseLoRA"])
    finally:
        plugins.load()
