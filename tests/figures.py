"""The figures that this tree holds itself to: `python tests/figures.py` prints them.

Standard library only, and `ruff` for the complexity of functions.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "lora_lightning"
PLUGINS = ROOT / "plugins"

MEDIAN, TENTH, LONGEST = 150, 350, 450
"""Lines of a file of core: median, the tenth that is longest begins here, longest."""
COMPLEXITY = 15
FOLDER = 150
"""Code lines of a method's folder."""
REPEATED, ELSEWHERE = 0.10, 3
"""Fraction of a folder's lines that may stand in so many other folders."""
FORMS = ("import ", "from ", "@", "def ", "class ", "raise ", "requires_api")
FORM_WORDS = {*keyword.kwlist, "self", "super", "__init__", "Tensor", "TYPE_CHECKING"}
WORDS = re.compile(r"[^\W\d]\w*")
BIBTEX = re.compile(r"(title|author|booktitle|journal|year|note) = ")
"""A line that begins as a form does, or has no other words than these, is no line that repeats."""


# -- files and functions -----------------------------------------------------------------------------------------------


def modules(root: Path | None = None) -> list[Path]:
    """Python files below a folder; those of core without one."""
    return sorted(path for path in (root or CORE).rglob("*.py") if "__pycache__" not in path.parts)


def length(path: Path) -> int:
    """Lines of a file, all of them."""
    return len(path.read_text(encoding="utf-8").splitlines())


def ninth_decile(numbers: list[int]) -> int:
    """The smallest number that nine tenths do not exceed."""
    ordered = sorted(numbers)
    return ordered[-(-len(ordered) * 9 // 10) - 1]


def complex_functions() -> list[str]:
    """Functions above the complexity, as `path:line message`."""
    ruff = shutil.which("ruff") or str(Path(sys.executable).parent / "ruff")
    words = [ruff, "check", "--select", "C901", "--config", f"lint.mccabe.max-complexity={COMPLEXITY}"]
    words += ["--output-format", "json", "--exit-zero", str(CORE), str(PLUGINS)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return [f"{name_of(Path(item['filename']))}:{item['location']['row']} {item['message']}" for item in found]


def name_of(path: Path) -> str:
    """A path as it is seen from the root of the tree."""
    return path.relative_to(ROOT).as_posix()


# -- methods -----------------------------------------------------------------------------------------------------------


def code_lines(source: str) -> list[str]:
    """Lines that hold code: no blank lines, no comments, no docstrings, no texts below fields; stripped."""
    texts = _text_lines(ast.parse(source))
    marks = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in marks:
            held.update(range(token.start[0], token.end[0] + 1))
    lines = source.splitlines()
    return [lines[number - 1].strip() for number in sorted(held - texts)]


def _text_lines(tree: ast.Module) -> set[int]:
    """Lines of strings that stand alone: docstrings, and the texts below fields."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def folders() -> list[Path]:
    """Folders of plugins."""
    return sorted(path for path in PLUGINS.glob("ll_*") if path.is_dir())


def brings_a_method(folder: Path) -> bool:
    """Whether a plugin's `__init__` answers the hook of methods."""
    return "lora_lightning_methods" in (folder / "__init__.py").read_text(encoding="utf-8")


def folder_lines(folder: Path) -> dict[str, list[str]]:
    """Code lines by file of a folder."""
    return {path.name: code_lines(path.read_text(encoding="utf-8")) for path in modules(folder)}


def table_of_folders() -> str:
    """Markdown: code lines of each plugin, by file."""
    rows = ["| folder | brings a method | code lines | files |", "| --- | --- | --- | --- |"]
    for folder in folders():
        files = {name: len(lines) for name, lines in folder_lines(folder).items()}
        listed = ", ".join(f"{name.removesuffix('.py')} {number}" for name, number in files.items())
        brings = "yes" if brings_a_method(folder) else "no"
        rows.append(f"| `{folder.name}` | {brings} | {sum(files.values())} | {listed} |")
    return "\n".join(rows)


def repeated() -> dict[str, float]:
    """Fraction of each folder's lines that stand in at least `ELSEWHERE` other plugin folders.

    Left out is what repeats in any code and can stand nowhere else: imports, decorators, the heads of functions and
    classes that the interface asks for, lines of keywords and brackets alone, and fields of BibTeX entries.
    """
    lines = {folder.name: _own_lines(folder) for folder in folders()}
    stand_in = Counter(line for found in lines.values() for line in set(found))
    return {
        name: sum(stand_in[line] > ELSEWHERE for line in found) / max(len(found), 1) for name, found in lines.items()
    }


def _own_lines(folder: Path) -> list[str]:
    found = [line for lines in folder_lines(folder).values() for line in lines]
    own = [line for line in found if not line.startswith(FORMS) and not BIBTEX.match(line)]
    return [line for line in own if set(WORDS.findall(line)) - FORM_WORDS]


# -- imports and tests -------------------------------------------------------------------------------------------------


def levels() -> dict[str, int]:
    """The table of rooms in `tests/test_boundaries.py`, read as text: room to level."""
    tree = ast.parse((ROOT / "tests" / "test_boundaries.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            rooms = ast.literal_eval(node.value)
            return {room: level for level, beside in enumerate(rooms) for room in beside}
    raise LookupError("tests/test_boundaries.py has no table ROOMS")


def module_name(path: Path) -> str:
    """`lora_lightning.adapters` for lora_lightning/adapters/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules of core that a file imports, also inside functions; not those for type checkers only."""
    known = {module_name(other) for other in modules()}
    return {name for name in _imports(ast.parse(path.read_text(encoding="utf-8"))) if name in known}


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports(ast.Module(child.orelse, []))
        else:
            yield from _imports(child)


def climbing() -> list[str]:
    """Imports from a room to one above it, as `module imports module`."""
    level = levels()
    found = []
    for path in modules():
        own = path.relative_to(CORE).parts[0].removesuffix(".py")
        above = [name for name in imported(path) - {"lora_lightning"} if level[name.split(".")[1]] > level[own]]
        found += [f"{module_name(path)} imports {name}" for name in sorted(above)]
    return found


def circles() -> list[str]:
    """Modules that import one another, or lie between those that do."""
    left = {module_name(path): imported(path) - {module_name(path), "lora_lightning"} for path in modules()}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def without_tests() -> list[str]:
    """Modules of core without a test file at the same path below `tests/`; those that only frame a package apart."""
    found = []
    for path in modules():
        inside = path.relative_to(CORE)
        if path.name in ("__init__.py", "__main__.py"):
            continue
        if not (ROOT / "tests" / inside.parent / f"test_{inside.name}").is_file():
            found.append(name_of(path))
    return found


# -- printing ----------------------------------------------------------------------------------------------------------


def report(title: str, rule: str, value: object, listed: list[str] | None = None) -> None:
    """One figure beside its rule, and what breaks it."""
    print(f"{title:<44} {value!s:>8}   {rule}")
    for line in listed or []:
        print(f"    {line}")


def main() -> None:
    """Print every figure."""
    lengths = {name_of(path): length(path) for path in modules()}
    numbers = list(lengths.values())
    report("files of core", "", len(numbers))
    report("lines of core", "", sum(numbers))
    report("lines of a file, median", f"at most {MEDIAN}", round(median(numbers)))
    report("lines of a file, 90th percentile", f"at most {TENTH}", ninth_decile(numbers))
    long = [f"{name} {number}" for name, number in lengths.items() if number > LONGEST]
    report("lines of a file, longest", f"at most {LONGEST}", max(numbers), long)
    found = complex_functions()
    report(f"functions above complexity {COMPLEXITY}", "none", len(found), found)
    found = climbing()
    report("climbing imports", "none", len(found), found)
    found = circles()
    report("modules in circles", "none", len(found), found)
    found = without_tests()
    report("modules without a test file at their path", "none", len(found), found)
    for name, fraction in repeated().items():
        report(f"lines of {name} in {ELSEWHERE} other plugins", f"at most {REPEATED:.0%}", f"{fraction:.1%}")
    print(f"\nCode lines of plugins, without blank lines, comments, docstrings and card; a method: at most {FOLDER}\n")
    print(table_of_folders())


if __name__ == "__main__":
    main()
