"""Documentation strings of the running interpreter's standard library, each with the area it describes.

The sources are read by syntax tree and never imported. The result depends on the interpreter's release alone.
"""

from __future__ import annotations

import ast
import gc
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from ll_demo.areas import AREA_OF
from lora_lightning.data.sources.splits import folded
from lora_lightning.errors import DataError

SHORTEST = 40
"""Characters below which a docstring says too little to tell its area."""
FEWEST = 1000
"""Examples below which the library's sources cannot be complete."""
TESTS = {"test", "tests", "idle_test"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def library_docstrings(library: Path | None = None) -> datasets.Dataset:
    """First paragraphs of the docstrings below `library`, by file and position: columns text, label, module.

    Texts that are equal but for case and spaces are one example, and none where their areas differ.

    Args:
        library: Folder of the standard library; None for the running interpreter's.

    Raises:
        DataError: the folder does not carry the library's sources.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    examples: dict[str, tuple[str, int, str] | None] = {}
    with no_garbage_collection():
        for file in sources(library):
            module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            label = AREA_OF[module.partition(".")[0]]
            for text in _paragraphs(file):
                first = examples.setdefault(folded(text), (text, label, module))
                if first is not None and first[1] != label:
                    examples[folded(text)] = None
    rows = [example for example in examples.values() if example is not None]
    if len(rows) < FEWEST:
        raise DataError(
            f"PyDocs found {len(rows)} docstrings in {library}; it needs at least {FEWEST}, from the sources (.py) of"
            " Python's standard library. Use an interpreter that carries them, or another data set."
        )
    texts, labels, modules = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"text": texts, "label": labels, "module": modules})


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Syntax trees hold no cycles, and walking through them in search of some takes twice the time of parsing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def sources(library: Path) -> list[Path]:
    """Source files of the modules that have an area, tests left out, in order."""
    tops = [path for path in library.glob("*") if path.name.removesuffix(".py") in AREA_OF]
    files = [file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top])]
    return sorted(file for file in files if TESTS.isdisjoint(file.relative_to(library).parts))


def syntax_tree(file: Path) -> ast.Module | None:
    """The file's syntax tree; None for one that is no Python source, such as a template."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in the library's own strings
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _paragraphs(file: Path) -> Iterator[str]:
    """First paragraphs that are long enough."""
    tree = syntax_tree(file)
    for docstring in _docstrings(tree) if tree else ():
        text = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
        if len(text) >= SHORTEST:
            yield text


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings(child)
