"""The site: `sphinx-build -W -b html docs docs/_build`.

Pages of methods and notes are copied from where they live, before Sphinx reads the rest: `plugins/*/README.md` to
`docs/cards/`, `lora_lightning/notes/*.md` to `docs/notes/`. Both folders are ignored by git.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lightning import __version__
from lora_lightning.plugins import registry

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "lora_lightning"
author = "the authors of lora_lightning"
copyright = "2026, the authors of lora_lightning"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False  # signatures name private helpers and types of packages whose inventories need a network

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a card's parts may start at any level

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_use_rtype = False
napoleon_custom_sections = [("Class facts", "params_style")]
default_role = "code"  # docstrings write `name`

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"lora_lightning {__version__}"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Inventories of other projects are fetched, which needs a network. Without one, links to them are left out.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
    }
    if os.environ.get("DOCS_ONLINE")
    else {}
)

# -- pages that live elsewhere -----------------------------------------------------------------------------------------

CARDS, NOTES = DOCS / "cards", DOCS / "notes"
HOOKS = {
    "lora_lightning_optimizers": "optimizer",
    "lora_lightning_callbacks": "callback",
    "lora_lightning_datamodules": "data module",
}


def settings_of(plugin: str) -> Iterator[tuple[str, str]]:
    """Import path and kind of each class that a plugin registers: methods first."""
    known = registry()
    for name, provider in sorted(known.providers.items()):
        if provider.plugin == plugin:
            method = known.methods[name]
            yield f"{method.__module__}.{method.__qualname__}", "method"
    module = importlib.import_module(plugin)
    for hook, kind in HOOKS.items():
        answer = getattr(module, hook, dict)()
        for cls in answer.values() if isinstance(answer, Mapping) else answer:
            path = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
            yield path.replace(":", "."), kind


def write_card(folder: Path) -> None:
    """The page of one plugin: its card, then every setting of the classes that it registers."""
    plugin = folder.name
    text = (folder / "README.md").read_text(encoding="utf-8")
    for picture in folder.glob("*.png"):
        (CARDS / plugin).mkdir(exist_ok=True)
        shutil.copy(picture, CARDS / plugin)
        text = text.replace(f"]({picture.name})", f"]({plugin}/{picture.name})")
    parts = [text.rstrip(), "\n## Every setting\n"]
    found = list(settings_of(plugin))
    for path, kind in found:
        options = ["   :members:", "   :exclude-members: " + HIDDEN] if kind == "method" else []
        parts.append("\n".join(["```{eval-rst}", f".. autoclass:: {path}", *options, "```", ""]))
    if not found:
        parts.pop()
    write_if_changed(CARDS / f"{plugin}.md", "\n".join(parts) + "\n")


HIDDEN = "build, param_groups, optimizer, callbacks, penalty, report, paper, bibtex, export, mergeable, peft_type"


def write_if_changed(path: Path, text: str) -> None:
    """Leave a page alone that is as it was, so that Sphinx does not read it again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(_: Any) -> None:
    """Write `docs/cards` and `docs/notes` anew; pages whose source is gone go too."""
    CARDS.mkdir(exist_ok=True)
    NOTES.mkdir(exist_ok=True)
    cards = sorted(path.parent for path in (ROOT / "plugins").glob("*/README.md"))
    notes = sorted(path for path in (ROOT / "lora_lightning" / "notes").glob("[0-9]*.md"))
    for page in CARDS.glob("*.md"):
        if page.stem not in {folder.name for folder in cards}:
            page.unlink()
    for page in NOTES.glob("*.md"):
        if page.name not in {note.name for note in notes}:
            page.unlink()
    for folder in cards:
        write_card(folder)
    for note in notes:
        write_if_changed(NOTES / note.name, note.read_text(encoding="utf-8"))


LINKS = {
    r"\]\(\.\./plugins/(\w+)/README\.md": r"](cards/\1.md",
    r"\]\(\.\./lora_lightning/notes/": "](notes/",
    r"\]\(\.\./CONTRIBUTING\.md": "](contributing.md",
    r"\]\(docs/": "](",
}
"""Links that work in a checkout, and what they are on the site."""


def site_links(_app: Any, _page: str, source: list[str]) -> None:
    """Turn links between files of the checkout into links between pages."""
    for pattern, link in LINKS.items():
        source[0] = re.sub(pattern, link, source[0])


# -- docstrings --------------------------------------------------------------------------------------------------------

CODE = re.compile(r"(`+[^`]+`+)")
SECTION = re.compile(r"\w[\w ]*:$")


def literal(lines: list[str]) -> list[str]:
    """Docstrings are plain text with `code` and indented blocks; reStructuredText has other marks for both.

    A block that is indented after a blank line becomes a literal block, except below the title of a section ("Args:").
    Elsewhere, what would be markup is escaped.
    """
    found: list[str] = []
    inside, title = False, ""
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if line.strip() and not indented:
            inside, title = False, line
        if indented and not inside and not before.strip() and not SECTION.match(title):
            found += ["::", ""]
            inside = True
        found.append(line if inside else escaped(line))
    return found


def escaped(line: str) -> str:
    """One line of text, its `code` as a literal."""
    parts = CODE.split(line)
    parts[::2] = [re.sub(r"([*|\\]|(?<=\w)_\b)", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(parts)


def plain_docstring(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Escape a docstring before napoleon reads its sections.

    Of an attribute's docstring, napoleon takes what stands before a colon for a type; an empty comment prevents that.
    """
    lines[:] = literal(lines)
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Any) -> None:
    """Register the steps above."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", site_links)
    app.connect("include-read", lambda app, path, _page, content: site_links(app, str(path), content))
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
