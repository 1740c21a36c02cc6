"""Null for a setting that has no null: one line that names it, wherever it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lora_lightning.cli.nulls import nulls
from lora_lightning.cli.parser import parser_of
from lora_lightning.data import LabelledText
from lora_lightning.errors import SettingsError
from lora_lightning.methods import Method


@dataclass
class Group:
    name: str = "x"
    count: int = 1


class Inner:
    def __init__(self, size: float = 1.0, other: str | None = "x", untyped="x") -> None:
        self.size, self.other, self.untyped = size, other, untyped


class Outer:
    def __init__(self, inner: Inner | None = None, several: list[Inner] | None = None, words: list[str] = []) -> None:  # noqa: B006
        self.inner, self.several, self.words = inner, several, words


def told(kind: Any, text: str) -> list[str]:
    parser = parser_of({"a": kind})
    return list(nulls(parser.parse_string(f"a: {text}"), parser))


INNER = f"class_path: {__name__}.Inner, init_args: "
OUTER = f"class_path: {__name__}.Outer, init_args: "
DATA = "class_path: lora_lightning.data.LabelledText, init_args: "


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [
        (Group, "{name: null}", 'a.name is null; it must be text. Leave it out, and it is "x".'),
        (Group, "{count: null}", "a.count is null; it must be a whole number. Leave it out, and it is 1."),
        (Inner, f"{{{INNER}{{size: null}}}}", "a.size is null; it must be a number. Leave it out, and it is 1.0."),
        (Outer, f"{{{OUTER}{{words: null}}}}", "a.words is null; it must be a list. Leave it out, and it is []."),
        (Outer, f"{{{OUTER}{{inner: {{{INNER}{{size: null}}}}}}}}", "a.inner.size is null"),
        (Outer, f"{{{OUTER}{{several: [{{{INNER}{{size: null}}}}]}}}}", "a.several.size is null"),
        (LabelledText, f"{{{DATA}{{text: null, on_error: null}}}}", "a.text is null"),
        (LabelledText, f"{{{DATA}{{max_length: null}}}}", "a.max_length is null"),
        (LabelledText, f"{{{DATA}{{on_error: null}}}}", 'a.on_error is null; it must be "raise" or "skip"'),
        (Method, "{class_path: LoRA, init_args: {scaling_rule: null}}", 'it must be "alpha/r" or "alpha/sqrt(r)"'),
    ],
)
def test_settings_without_a_null(kind, text, key):
    assert any(key in one for one in told(kind, text))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Inner, f"{{{INNER}{{other: null, untyped: null}}}}"),
        (Outer, f"{{{OUTER}{{inner: null, several: null}}}}"),
        (LabelledText, f"{{{DATA}{{text_pair: null, labels: null, train: null}}}}"),
        (Literal["x", None], "null"),
        (str | None, "null"),
        (Any, "null"),
    ],
)
def test_settings_with_a_null(kind, text):
    assert told(kind, text) == []


def test_the_parser_refuses_them():
    parser = parser_of({"a": Group})
    with pytest.raises(SettingsError, match=r'^a\.name is null; it must be text\. Leave it out, and it is "x"'):
        parser.parse_args(["--a", "{name: null}"])
