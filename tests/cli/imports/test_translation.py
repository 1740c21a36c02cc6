"""What is read, carried over, and never dropped without a word."""

from __future__ import annotations

import pytest
import yaml

from lora_lightning.cli.imports.translation import Translation, method_of
from lora_lightning.cli.other_tools import ABSENT, SETTINGS, UNNEEDED
from lora_lightning.errors import SettingsError


@pytest.mark.parametrize("word", [*SETTINGS, *ABSENT, *UNNEEDED, "nobody_knows"])
def test_every_setting_ends_somewhere(word):
    t = Translation("a tool", {word: 3})
    t.finish()
    assert (word in t.lost) + (word in t.unneeded) + (len(t.config) == 1) == 1
    assert word in t.text("x.yaml") or t.config


def test_null_says_nothing_and_false_is_off():
    t = Translation("a tool", {"a": None, "b": False, "pissa_init": False, "max_grad_norm": None})
    t.finish()
    assert t.lost == {}
    assert t.unneeded == {"b": "it is off"}


def test_classes_hold_their_settings():
    t = Translation("a tool", {})
    for place, value in (
        ("data.train", "a"), ("data", "Chat"), ("model.optimizer.inner.lr", 1e-5), ("model.optimizer.ratio", 2.0),
        ("model.optimizer.inner", "AdamW"), ("model.optimizer", "Outer"), ("seed_everything", 3),
    ):  # fmt: skip
        t.put(place, value)
    inner = {"class_path": "AdamW", "init_args": {"lr": 1e-5}}
    assert t.nested() == {
        "seed_everything": 3,
        "model": {"optimizer": {"class_path": "Outer", "init_args": {"inner": inner, "ratio": 2.0}}},
        "data": {"class_path": "Chat", "init_args": {"train": "a"}},
    }
    assert yaml.safe_load(t.text("x")) == t.nested()


def test_a_long_value_is_shown_short():
    t = Translation("a tool", {"odd": ["x" * 30] * 9})
    t.finish()
    assert max(map(len, t.text("f").splitlines())) < 130


def test_numbers_in_text():
    t = Translation("a tool", {"a": "1e-4", "b": "8", "c": "x"})
    assert (t.number("a"), t.number("b")) == (1e-4, 8)
    assert t.number("d", default=2) == 2
    with pytest.raises(SettingsError, match='c is "x"; it must be a number'):
        t.number("c")


def test_methods_by_the_words_of_peft():
    assert {method_of({}), method_of({"use_dora": True})} == {"LoRA", "DoRA"}
    with pytest.raises(SettingsError, match="0 installed methods are peft's LoRA with use_x"):
        method_of({"use_x": True})
