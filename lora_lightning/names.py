"""Short names that torch, Lightning and core give to what configs name, read in their sources: nothing is imported."""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "lightning", "lora_lightning")
_SOURCES = {
    "optimizers": ("torch/optim/__init__.py",),
    "callbacks": ("lightning/pytorch/callbacks/__init__.py", "lora_lightning/callbacks/__init__.py"),
    "datamodules": ("lora_lightning/data/__init__.py",),
    "strategies": ("lightning/pytorch/strategies/__init__.py", "lora_lightning/strategies.py"),
}


@functools.cache
def known_names(kind: str) -> dict[str, str]:
    """Package by class name.

    Args:
        kind: key of `_SOURCES`.
    """
    return {
        name: source.partition("/")[0] for source in _SOURCES[kind] for name in _classes(source) if name[0].isupper()
    }


def statements(source: str) -> list[ast.stmt]:
    """What stands in a file of an installed package, given from the package's name on; nothing where there is none."""
    package, _, file = source.partition("/")
    spec = find_spec(package)
    [folder, *_] = (spec.submodule_search_locations if spec else None) or [""]
    try:
        return ast.parse(Path(folder, file).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):
        return []


def _classes(source: str) -> list[str]:
    """Names in `__all__`; without one, of the classes that the file defines."""
    body = statements(source)
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return [node.name for node in body if isinstance(node, ast.ClassDef)]
