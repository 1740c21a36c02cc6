"""Documented functions and classes of the running interpreter's standard library, with what their syntax tree says.

Read by syntax tree, never imported. The result depends on the interpreter's release alone.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from ll_demo.docstrings import no_garbage_collection, sources, syntax_tree

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BLOCKS = ("body", "orelse", "handlers", "finalbody")
TRAITS = ("branches", "class", "method", "parameters", "private", "returns")
"""It branches, is a class, is a method, takes parameters, has a name with an underscore before it, returns a value."""


@dataclass(frozen=True)
class Documented:
    """One function, method or class."""

    name: str
    """Dotted, with the module."""
    paragraphs: tuple[str, ...]
    """Paragraphs of the docstring with single spaces; examples (doctests) are left out."""
    parameters: frozenset[str]
    """Names of a function's parameters but the first of a method; none of a class."""
    traits: frozenset[str]
    """What its syntax tree says of it, of `TRAITS`."""
    statements: int = 0
    """Statements of a function, those inside others too, but for the docstring."""


@cache
def documented(library: Path | None = None) -> tuple[Documented, ...]:
    """Everything with a docstring below `library`, by file and position; None for the running interpreter's."""
    library = library or Path(sysconfig.get_path("stdlib"))
    found: list[Documented] = []
    with no_garbage_collection():
        for file in sources(library):
            module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            tree = syntax_tree(file)
            found += _definitions(tree.body, module, inside_class=False) if tree else ()
    return tuple(found)


def _definitions(block: Iterable[ast.AST], path: str, inside_class: bool) -> Iterator[Documented]:
    for statement in block:
        inner = chain.from_iterable(getattr(statement, part, ()) for part in BLOCKS)
        if not isinstance(statement, DEFINITIONS):
            yield from _definitions(inner, path, inside_class)
            continue
        name, is_class = f"{path}.{statement.name}", isinstance(statement, ast.ClassDef)
        if paragraphs := _paragraphs(ast.get_docstring(statement) or ""):
            private = {"private"} if statement.name.startswith("_") else set()
            if isinstance(statement, ast.ClassDef):
                yield Documented(name, paragraphs, frozenset(), frozenset({"class", *private}))
            else:
                parameters, traits = _parameters(statement, inside_class), _traits(statement, inside_class)
                yield Documented(name, paragraphs, parameters, traits | private, _statements(statement))
        yield from _definitions(inner, name, is_class)


def _paragraphs(docstring: str) -> tuple[str, ...]:
    texts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring.strip()))
    return tuple(text for text in texts if text and ">>>" not in text)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> frozenset[str]:
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args][int(method) :]
    named = [*plain, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
    return frozenset(argument.arg for argument in named)


def _traits(function: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> frozenset[str]:
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    values = [node.value for node in nodes if isinstance(node, ast.Return)]
    found = {
        "branches": any(isinstance(node, ast.If | ast.IfExp) for node in nodes),
        "method": method,
        "parameters": bool(_parameters(function, method)),
        "returns": any(value is not None and not _is_none(value) for value in values),
    }
    return frozenset(trait for trait, there in found.items() if there)


def _statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return sum(isinstance(node, ast.stmt) for statement in function.body[1:] for node in ast.walk(statement))


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None
