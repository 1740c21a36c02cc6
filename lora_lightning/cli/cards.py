"""What the code of a method or another part says about it: settings with a text each, and the README beside it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_lightning.registry import arguments

_SECTION = re.compile(r"(Args|Arguments|Attributes|Raises|Returns|Example|Examples|Inputs):|:param .*|\.\. .*")

_CARD_SECTION = re.compile(r"#+ +(.+)|\*\*(.+?)\*\*")
_ON_PAGE = ("When to use", "Cost", "Limits", "Takes", "Export", "Cite")


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
            _type(field.type, cls),
            _default(field),
            texts.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
    ]


def arguments_of(cls: type[Any]) -> list[FieldCard]:
    """What a class takes, with what its docstring and its bases' say of each; a config gives no `params`."""
    from docstring_parser import parse

    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= attribute_docstrings(base)
        for doc in (vars(base).get("__doc__"), getattr(vars(base).get("__init__"), "__doc__", None)):
            for part in parse(inspect.cleandoc(doc or "")).params:
                texts[part.arg_name] = " ".join((part.description or "").split())
    return [
        FieldCard(name, _type(given.annotation, cls), _written(given.default), texts.get(name, ""))
        for name, given in arguments(cls).items()
        if name != "params"
    ]


def description_of(cls: type[Any]) -> str:
    """Its docstring without the sections about arguments, attributes and errors; empty where it has none of its own."""
    lines = inspect.cleandoc(vars(cls).get("__doc__") or "").splitlines()
    end = next((n for n, line in enumerate(lines) if _SECTION.fullmatch(line.strip())), len(lines))
    return "\n".join(lines[:end]).strip()


def _type(annotation: Any, cls: type[Any]) -> str:
    if annotation is inspect.Parameter.empty:
        return "any"
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation, cls.__module__)


def _written(default: Any) -> str:
    return "required" if default is inspect.Parameter.empty else repr(default)


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


def page_of(readme: str) -> tuple[str, list[str]]:
    """What of a card fits on a page, and the titles of the sections that are left out.

    A section begins at a heading, or at a paragraph with a bold beginning. Kept are the introduction and what says when
    to use a method, what it costs and takes, and how it leaves: sections of `_ON_PAGE`.
    """
    kept: list[str] = []
    left: list[str] = []
    keeps, code = True, False
    for line in readme.splitlines():
        code ^= line.startswith("```")
        if not code and (match := _CARD_SECTION.match(line)) and kept:
            title = (match[1] or match[2]).rstrip(".: ")
            keeps = title.startswith(_ON_PAGE)
            if not keeps:
                left.append(title)
        if keeps:
            kept.append(line)
    return "\n".join(kept) + "\n", left


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"
