"""Parts of README.md and docs/ that come from the code. `python tests/pages.py` writes them anew.

A part stands between `<!-- NAME: ... -->` and `<!-- /NAME -->`. Parts that take a run to make are printed by their own
scripts: `tests/composition.py`, `tests/architectures.py`, `tests/sharded_cases.py`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from figures import folder_lines
from figures import folders as plugin_folders

from lora_lightning import hookspecs
from lora_lightning.cli import other_tools
from lora_lightning.cli.verbs.methods import markdown_table
from lora_lightning.plugins import registry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def section(page: Path, name: str) -> str:
    """What stands in a page between the marks of one part."""
    return re.search(_pattern(name), page.read_text(encoding="utf-8"), flags=re.S)[2]


def write(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks of one part."""
    old = page.read_text(encoding="utf-8")
    new = re.sub(_pattern(name), lambda match: f"{match[1]}{text}{match[3]}", old, flags=re.S)
    page.write_text(new, encoding="utf-8")


def _pattern(name: str) -> str:
    return rf"(<!-- {name}(?:: [^\n]*)? -->\n)(.*?)(<!-- /{name} -->)"


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, the line below the head left out."""
    found = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.strip().splitlines()]
    return [found[0], *found[2:]]


def as_table(cells: list[list[str]]) -> str:
    """A Markdown table with a line below the head."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def card_link(name: str, plugin: str, page: Path) -> str:
    """The name with a link to the card in the plugin's folder."""
    up = "../" if page.parent == DOCS else ""
    return f"[{name}]({up}plugins/{plugin}/README.md)"


def methods_in_short() -> str:
    """Name with card, paper, and how a method leaves."""
    head, *found = rows(markdown_table(registry()))
    columns = [head.index(name) for name in ("Method", "Paper", "Mergeable", "Export")]
    short = [[row[index] for index in columns] for row in found]
    for row in short:
        row[0] = card_link(row[0], registry().providers[row[0]].plugin, README)
    return as_table([[head[index] for index in columns], *short])


def methods_in_full() -> str:
    """The table of `methods --markdown`, with what each method is."""
    head, *found = rows(markdown_table(registry()))
    page = DOCS / "methods.md"
    for row in found:
        name = row[0]
        idea = inspect.getdoc(registry().methods[name]) or ""
        row[0] = card_link(name, registry().providers[name].plugin, page)
        row[head.index("Package")] = first_sentence(idea)
    head[head.index("Package")] = "Idea"
    return as_table([head, *found])


def first_sentence(docstring: str) -> str:
    """The first paragraph of a docstring on one line, without its last full stop."""
    return " ".join(docstring.split("\n\n")[0].split()).rstrip(".").replace("|", "\\|")


def optimizers() -> str:
    """Name with card, and the first sentence, of every optimizer that a plugin of this repository brings."""
    page = DOCS / "optimizers.md"
    found = [
        [card_link(cls.__name__, plugin, page), first_sentence(inspect.getdoc(cls) or "")]
        for plugin, cls in sorted(_classes("lora_lightning_optimizers"), key=lambda item: item[1].__name__)
    ]
    return as_table([["optimizer", "idea"], *found])


def starts() -> str:
    """Name with card, paper, first sentence, and whether the start is taken off, of every start of this repository."""
    page, rows = DOCS / "methods.md", []
    for plugin, cls in sorted(_classes("lora_lightning_starts"), key=lambda item: item[1].__name__):
        start: Any = cls
        paper = f"[arXiv:{start.paper}](https://arxiv.org/abs/{start.paper})"
        idea = first_sentence(inspect.getdoc(cls) or "")
        rows.append([card_link(cls.__name__, plugin, page), paper, idea, "yes" if start.subtracts else "no"])
    return as_table([["start", "paper", "idea", "taken off again"], *rows])


def _classes(hook: str) -> Iterator[tuple[str, type]]:
    """Plugin and class for all that the plugins in `plugins/` answer to a hook."""
    for folder in sorted(ROOT.glob("plugins/ll_*")):
        answer = getattr(importlib.import_module(folder.name), hook, dict)()
        for cls in answer.values() if isinstance(answer, Mapping) else answer:
            if isinstance(cls, str):
                module, _, name = cls.partition(":")
                cls = getattr(importlib.import_module(module), name)
            yield folder.name, cls


def hooks() -> str:
    """Signature and docstring of each hook, in the order of hookspecs.py."""
    return "\n".join(_hook(hook) for hook in hook_functions())


def hook_functions() -> list[Callable[..., object]]:
    """The hooks, in the order they stand in hookspecs.py."""
    found = [
        function
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if name.startswith(hookspecs.NAMESPACE)
    ]
    return sorted(found, key=lambda function: function.__code__.co_firstlineno)


def _hook(hook: Callable[..., object]) -> str:
    signature = str(inspect.signature(hook)).replace("'", "")
    return f"### `{hook.__name__}{signature}`\n\n{inspect.getdoc(hook)}\n"


def api_range() -> str:
    """The line of a plugin that names the versions of the interface, with the range that holds this one."""
    major = int(hookspecs.API.partition(".")[0])
    return f'requires_api = ">={major},<{major + 1}"'


def api_block() -> str:
    """That line as a block."""
    return f"```python\n{api_range()}\n```\n"


def plugin_init() -> str:
    """The `__init__` of a plugin."""
    return f"""```python
from lora_lightning import hookimpl

{api_range()}


@hookimpl
def lora_lightning_methods():
    return [TinyLoRA]
```
"""


def folders() -> str:
    """Code lines of each plugin's folder."""
    found = [[f"`{folder.name}`", str(sum(map(len, folder_lines(folder).values())))] for folder in plugin_folders()]
    return as_table([["folder", "code lines"], *found])


def words_of_settings() -> str:
    """Settings of other tools, and where they stand here: a row a place."""
    by_place: dict[str, list[str]] = {}
    for word, place in other_tools.SETTINGS.items():
        by_place.setdefault(place, []).append(f"`{word}`")
    return as_table([["elsewhere", "here"], *([", ".join(words), _code(place)] for place, words in by_place.items())])


def words_of_templates() -> str:
    """Names of chat templates."""
    by_ours: dict[str, list[str]] = {}
    for word, (ours, options) in other_tools.TEMPLATES.items():
        told = "".join(f", with `chat_template_kwargs: {{{k}: {str(v).lower()}}}`" for k, v in options.items())
        by_ours.setdefault(f"`{ours}`{told}", []).append(f"`{word}`")
    return as_table([["elsewhere", "here"], *([", ".join(words), ours] for ours, words in by_ours.items())])


def words_of_verbs() -> str:
    """Verbs, methods and kinds of data."""
    found = [[f"`{word}`", f"`{ours}`"] for word, ours in other_tools.VERBS.items()]
    found += [[f"`{word}` (a method)", ours] for word, ours in other_tools.METHODS.items()]
    found += [[f"`{word}` (data)", ours] for word, ours in other_tools.DATA.items()]
    return as_table([["elsewhere", "here"], *found])


def words_that_are_absent() -> str:
    """What has no counterpart, and what to do instead."""
    by_why: dict[str, list[str]] = {}
    for word, why in other_tools.ABSENT.items():
        by_why.setdefault(why, []).append(f"`{word}`")
    return as_table([["elsewhere", "here"], *([", ".join(words), why] for why, words in by_why.items())])


def _code(place: str) -> str:
    setting, blank, rest = place.partition(" ")
    return f"`{setting}`{blank}{rest}" if "." in setting or not rest else place


PARTS: dict[tuple[Path, str], Callable[[], str]] = {
    (README, "methods"): methods_in_short,
    (DOCS / "from_elsewhere.md", "settings"): words_of_settings,
    (DOCS / "from_elsewhere.md", "templates"): words_of_templates,
    (DOCS / "from_elsewhere.md", "verbs"): words_of_verbs,
    (DOCS / "from_elsewhere.md", "absent"): words_that_are_absent,
    (DOCS / "methods.md", "methods"): methods_in_full,
    (DOCS / "methods.md", "starts"): starts,
    (DOCS / "optimizers.md", "optimizers"): optimizers,
    (DOCS / "plugins.md", "hooks"): hooks,
    (DOCS / "plugins.md", "init"): plugin_init,
    (CONTRIBUTING, "range"): api_block,
}
"""Page and name of each part that is cheap to make, and what makes it."""


def main() -> None:
    """Write every cheap part."""
    for (page, name), make in PARTS.items():
        write(page, name, make())
    write(CONTRIBUTING, "folders", folders())


if __name__ == "__main__":
    main()
