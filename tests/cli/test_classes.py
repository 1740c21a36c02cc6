from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from lora_lightning import plugins
from lora_lightning.cli.classes import bases_of, imported_class, noun, parameters_of, short_names
from lora_lightning.methods import Method


class ShapeBase:
    def __init__(self, params: Iterable[int], size: int = 3, *others: int, colour: str = "red", **more: int):
        pass


class Square(ShapeBase):
    pass


class _Hidden(Square):
    pass


class LRRoundThing(_Hidden):
    pass


@pytest.mark.parametrize(
    ("hint", "bases"),
    [
        (ShapeBase, [ShapeBase]),
        (ShapeBase | None, [ShapeBase]),
        (list[ShapeBase] | ShapeBase | None, [ShapeBase, ShapeBase]),
        (Callable[[Iterable[Method]], ShapeBase] | None, [ShapeBase]),
        (int | str | None, []),
        ("Method | Something", [Method]),
        ("MethodLike | Something", []),
        (None, []),
    ],
)
def test_the_classes_behind_a_type(hint, bases):
    assert bases_of(hint) == bases


def test_names_are_those_a_config_can_give():
    class Local(ShapeBase):
        pass

    assert Local in ShapeBase.__subclasses__()
    assert short_names([ShapeBase]) == ["LRRoundThing", "Square"]
    assert short_names([Method]) == sorted(plugins.registry().methods)


@pytest.mark.parametrize(
    ("bases", "words"),
    [([ShapeBase], "shape base"), ([LRRoundThing], "lr round thing"), ([Method], "method"), ([], "class")],
)
def test_a_class_in_words(bases, words):
    assert noun(bases) == words


def test_parameters_that_a_config_gives():
    assert parameters_of(Square) == ["size", "colour"]


def test_only_imported_classes_are_found():
    assert imported_class(f"{__name__}.Square") is Square
    assert imported_class("no_such_module.Square") is None
    assert imported_class(f"{__name__}.pytest") is None
