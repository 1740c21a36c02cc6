"""Names and arguments of the classes that configs can name, read in sources: nothing is imported but root packages."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("torch", "lightning", "lora_lightning")
_HOMES = {
    "optimizers": ("torch.optim",),
    "callbacks": ("lightning.pytorch.callbacks", "lora_lightning.callbacks"),
    "datamodules": ("lora_lightning.data",),
    "strategies": ("lightning.pytorch.strategies", "lora_lightning.training.strategies"),
}
"""Modules in which torch, Lightning and core offer classes of a kind."""


@functools.cache
def known_names(kind: str) -> dict[str, str]:
    """Module by the short name of each class of torch, Lightning and core.

    Args:
        kind: key of `_HOMES`.
    """
    return {name: home for home in _HOMES[kind] for name in _offered(home) if name[0].isupper()}


def _offered(module: str) -> list[str]:
    """Names in `__all__`; without one, of the classes that the module defines."""
    body = statements(module)
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return [node.name for node in body if isinstance(node, ast.ClassDef)]


def source_file(module: str) -> Path:
    """The file of a module; only its root package is looked for, which imports nothing.

    Raises:
        ImportError: there is no such package.
    """
    root, *parts = module.split(".")
    spec = importlib.util.find_spec(root)
    if spec is None or spec.origin is None:
        raise ImportError(module)
    path = Path(spec.origin)
    if parts:
        path = path.parent.joinpath(*parts)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path


def statements(module: str) -> list[ast.stmt]:
    """What stands in a module's source, which is not run; nothing where it cannot be read."""
    try:
        return ast.parse(source_file(module).read_text(encoding="utf-8")).body
    except (ImportError, OSError, SyntaxError, ValueError):
        return []


def lineage(module: str, name: str) -> Iterator[ast.ClassDef]:
    """The class that a module defines or imports under a name, then its bases, as far as sources tell."""
    body = statements(module)
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield node
            for base in node.bases:
                yield from lineage(module, ast.unparse(base).partition("[")[0].rpartition(".")[2])
            return
    for inner in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(inner, ast.ImportFrom) and (home := imported_from(inner, module)) != module:
            for alias in inner.names:
                if name == (alias.asname or alias.name):
                    yield from lineage(home, alias.name)
                    return


def imported_from(node: ast.ImportFrom, module: str) -> str:
    """The full name of the module from which `node`, in the source of `module`, imports."""
    package = module.split(".")
    if node.level and source_file(module).name != "__init__.py":
        package.pop()
    return ".".join([*(package[: len(package) + 1 - node.level] if node.level else []), *filter(None, [node.module])])


def parameters(module: str, name: str) -> list[str]:
    """What a class takes by name, those it hands on to its bases included."""
    found: list[str] = []
    for node in lineage(module, name):
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if init is not None:
            found += [argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)]
            if init.args.kwarg is None:
                break
        elif any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list):
            found += _fields(node)
    return list(dict.fromkeys(found))


def _fields(node: ast.ClassDef) -> list[str]:
    """Fields that a dataclass declares."""
    return [
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not ast.unparse(statement.annotation).startswith("ClassVar")
    ]
