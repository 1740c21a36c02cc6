"""Who may import whom, read in the syntax trees, so that no reviewer has to remember it."""

from __future__ import annotations

import ast
import functools
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lora_lightning
from lora_lightning.plugins import registry

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "lora_lightning").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("ll_*/**/*.py"))

ROOMS = (
    ("errors", "version", "seeds", "distributed"),
    ("adapters",),
    ("start_values", "methods", "stages", "hookspecs", "plugin_code", "registry", "plugins"),
    ("models",),
    ("injection",),
    ("data",),
    ("optim",),
    ("storage",),
    ("exporters",),
    ("callbacks",),
    ("training",),
    ("cli",),
    ("testing", "pytest_plugin"),
    ("__init__", "__main__"),
)
"""Rooms of core from the ground up: one imports from those before it, and from its own level only inside itself.

`testing` stands above the command line: its contract parses a method's settings as a config does. `pytest_plugin` is
what pytest loads of this library in every run, and imports nothing.
"""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
WITHIN_A_LEVEL = {
    ("distributed", "errors"),
    ("seeds", "errors"),
    ("methods", "start_values"),
    ("stages", "methods"),
    ("hookspecs", "methods"),
    ("hookspecs", "start_values"),
    ("registry", "start_values"),
    ("plugins", "start_values"),
    ("registry", "methods"),
    ("registry", "hookspecs"),
    ("plugin_code", "hookspecs"),
    ("registry", "plugin_code"),
    ("plugins", "plugin_code"),
    ("plugins", "methods"),
    ("plugins", "hookspecs"),
    ("plugins", "registry"),
}
"""Single modules on one level: which imports which."""

LIGHT = {
    "errors",
    "version",
    "start_values",
    "methods",
    "stages",
    "hookspecs",
    "plugin_code",
    "registry",
    "plugins",
    "__init__",
}
"""What the light verbs import before torch."""

WITHOUT_LIGHTNING = {room for room in LEVEL if LEVEL[room] < LEVEL["callbacks"]} - {"data"}
"""Rooms that serve a bare script: everything but the training loop. Data modules are Lightning's."""


@dataclass(frozen=True)
class Import:
    module: str
    top_level: bool
    typing_only: bool


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[Import]:
    return list(_imports(tree(path), path, top_level=True, typing_only=False))


def _imports(node: ast.AST, path: Path, top_level: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, top_level, typing_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}: relative import"
            yield Import(child.module or "", top_level, typing_only)
            for alias in child.names:  # `from lora_lightning import injection` imports a part too
                yield Import(f"{child.module}.{alias.name}", top_level, typing_only)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.body:
                yield from _imports(ast.Module([statement], []), path, top_level, typing_only=True)
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), path, top_level, typing_only)
        else:
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, path, top_level and not inner, typing_only)


def root_of(module: str) -> str:
    return module.split(".")[0]


def part_of(path: Path) -> str:
    """`adapters` for lora_lightning/adapters/base.py, `module` for lora_lightning/module.py."""
    return path.relative_to(ROOT / "lora_lightning").parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """`lora_lightning.adapters` for lora_lightning/adapters/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in CORE}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_walk_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import a\nfrom b.c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "try:\n    import g\nexcept ImportError:\n    pass\nclass X:\n    def y(self):\n        import h\n"
    )
    found = {item.module: (item.top_level, item.typing_only) for item in imports(file)}
    assert found == {
        "a": (True, False),
        "b.c": (True, False),
        "b.c.d": (True, False),
        "e": (True, True),
        "f": (True, False),
        "g": (True, False),
        "h": (False, False),
    }
    assert len(CORE) > 20
    assert len(PLUGINS) > 3


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_core_never_imports_a_plugin(path: Path) -> None:
    assert not [
        item for item in imports(path) if root_of(item.module).startswith("ll_") or root_of(item.module) == "plugins"
    ]


def _words(path: Path) -> set[str]:
    """Every identifier and string literal."""
    words: set[str] = set()
    for node in ast.walk(tree(path)):
        for field in ("id", "attr", "name", "asname", "arg", "value", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                words.add(value)
    return words


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_core_never_spells_a_methods_name(path: Path) -> None:
    names = set(registry().methods) | {folder.name for folder in (ROOT / "plugins").glob("ll_*")}
    assert {"LoRA", "ll_lora"} <= names
    assert not _words(path) & names


def test_every_module_of_core_has_a_level() -> None:
    assert not {name_of(path) for path in CORE if part_of(path) not in LEVEL}
    there = {part_of(path) for path in CORE}
    assert not [room for room in LEVEL if room not in there], "the table names rooms that are gone"


@pytest.mark.parametrize("path", [p for p in CORE if part_of(p) in WITHOUT_LIGHTNING], ids=name_of)
def test_the_plain_torch_half_never_imports_lightning(path: Path) -> None:
    real = [item.module for item in imports(path) if not item.typing_only]
    assert not [module for module in real if root_of(module) in ("lightning", "pytorch_lightning")]


def test_only_the_command_line_knows_the_parser() -> None:
    assert not [
        name_of(path)
        for path in CORE
        if part_of(path) != "cli" and any(root_of(item.module) == "jsonargparse" for item in imports(path))
    ]


def _inside(path: Path) -> Iterator[str]:
    """Modules of core that a file imports, wherever the import stands; not for type checkers only."""
    for item in imports(path):
        if root_of(item.module) == "lora_lightning" and not item.typing_only and item.module in MODULES:
            yield item.module


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_imports_in_core_go_down(path: Path) -> None:
    own = part_of(path)
    for module in _inside(path):
        if module == "lora_lightning":
            continue
        room = module.split(".")[1]
        climbs = LEVEL[room] > LEVEL[own]
        beside = LEVEL[room] == LEVEL[own] and room != own and (own, room) not in WITHIN_A_LEVEL
        assert not climbs, f"{name_of(path)} imports {module}"
        assert not beside, f"{name_of(path)} imports {module}"


def test_no_module_inside_imports_the_packages_init() -> None:
    """`from lora_lightning import NAME` is for users; inside, a name is imported from where it is defined."""
    wrong = [
        f"{name_of(path)}: {item.module}"
        for path in CORE
        if part_of(path) != "__init__"
        for item in imports(path)
        if not item.typing_only and item.module.count(".") == 1 and root_of(item.module) == "lora_lightning"
        if item.module not in MODULES
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    """Imports inside functions count."""
    edges = {module: set(_inside(path)) - {module, "lora_lightning"} for module, path in MODULES.items()}
    left = dict(edges)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import one another: {', '.join(sorted(left))}"


@pytest.mark.parametrize("path", PLUGINS, ids=name_of)
def test_a_plugin_imports_no_other_plugin(path: Path) -> None:
    own = path.relative_to(ROOT / "plugins").parts[0]
    assert not [i for i in imports(path) if root_of(i.module).startswith("ll_") and root_of(i.module) != own]


@pytest.mark.parametrize("path", [p for p in PLUGINS if p.name in ("method.py", "__init__.py")], ids=name_of)
def test_settings_import_neither_torch_nor_lightning(path: Path) -> None:
    heavy = {"torch", "lightning", "pytorch_lightning", "transformers"}
    assert not [i for i in imports(path) if i.top_level and not i.typing_only and root_of(i.module) in heavy]


@pytest.mark.parametrize(
    "path", [p for p in PLUGINS if p.name in ("method.py", "functional.py", "adapter.py")], ids=name_of
)
def test_methods_of_a_plugin_work_without_lightning(path: Path) -> None:
    assert not [
        i for i in imports(path) if not i.typing_only and root_of(i.module) in ("lightning", "pytorch_lightning")
    ]


def test_every_plugin_enters_by_the_same_door() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folders = {folder.name for folder in (ROOT / "plugins").glob("ll_*")}
    assert project["entry-points"]["lora_lightning"] == {name: name for name in folders}


# -- the root package --------------------------------------------------------------------------------------------------


def test_importing_the_root_and_all_plugins_is_light() -> None:
    code = (
        "import sys, lora_lightning\n"
        "from lora_lightning import plugins\n"
        "print(sorted(plugins.load().methods))\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'transformers', 'jsonargparse', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert "LoRA" in process.stdout


def test_no_lazy_name_is_a_submodules_name() -> None:
    """`import lora_lightning.x` would put the module in the place of the name."""
    package = ROOT / "lora_lightning"
    modules = {path.stem for path in package.glob("*.py")} | {path.name for path in package.iterdir() if path.is_dir()}
    assert not modules & set(lora_lightning._HOME)


def test_all_is_what_there_is() -> None:
    assert sorted(lora_lightning.__all__) == sorted([*lora_lightning._HOME, "hookimpl", "testing"])
    assert dir(lora_lightning) == sorted(lora_lightning.__all__)
    with pytest.raises(AttributeError, match="module 'lora_lightning' has no attribute 'injct'"):
        _ = lora_lightning.injct  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", lora_lightning.__all__)
def test_every_lazy_name_resolves(name: str) -> None:
    value = getattr(lora_lightning, name)
    if name in lora_lightning._HOME:
        home = importlib.import_module(f"lora_lightning.{lora_lightning._HOME[name]}")
        assert value is getattr(home, name)


def test_what_type_checkers_see_is_what_is_there() -> None:
    """The imports under TYPE_CHECKING in the root name the same homes as the table."""
    tree = ast.parse((ROOT / "lora_lightning" / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        alias.name: (node.module or "").removeprefix("lora_lightning").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {**lora_lightning._HOME, "testing": ""}
