"""What a method's own files say about it: fields with the text under each, and the README beside its code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FieldCard:
    """One setting of a method."""

    name: str
    type: str
    default: str
    """As Python writes it; "required" where there is none."""
    text: str
    """The string under the field, on one line."""


def fields_of(cls: type[Any]) -> list[FieldCard]:
    """Every field of a dataclass, those of its bases included.

    Raises:
        TypeError: `cls` is no dataclass.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= attribute_docstrings(base)
    return [
        FieldCard(
            field.name,
            field.type if isinstance(field.type, str) else inspect.formatannotation(field.type, cls.__module__),
            _default(field),
            texts.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
    ]


def attribute_docstrings(cls: type[Any]) -> dict[str, str]:
    """Strings that stand under the annotated names of a class body, by name; none where the source is not at hand."""
    try:
        [node] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    body = node.body if isinstance(node, ast.ClassDef) else []
    found = {}
    for statement, below in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[statement.target.id] = " ".join(text.value.split())
    return found


def readme_of(cls: type[Any]) -> str:
    """The README.md in the package that defines `cls`, or in the nearest around it; empty where there is none."""
    module = cls.__module__
    while module:
        for folder in getattr(sys.modules.get(module), "__path__", ()):
            readme = Path(folder) / "README.md"
            if readme.is_file():
                return readme.read_text(encoding="utf-8")
        module = module.rpartition(".")[0]
    return ""


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"
