"""List installed methods, starts, optimizers, callbacks, and plugins that failed."""

from __future__ import annotations

import argparse

from lora_lightning.cli.console import print_table
from lora_lightning.methods import Method
from lora_lightning.plugins import registry
from lora_lightning.registry import FORMATS, Registry, one_line

COLUMNS = ("Method", "Paper", "Package", "Version", "Mergeable", "Starts at base", "Export")
KINDS = {"optimizer": "optimizers", "callback": "callbacks", "data module": "datamodules"}
"""What is listed beside methods, and under which word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether to print for a terminal or for a README."""
    parser.add_argument("--markdown", action="store_true", help="the table as the documentation has it")


def run(args: argparse.Namespace) -> int:
    """Print the table, then one line for each plugin that is not in it."""
    known = registry()
    if args.markdown:
        print(markdown_table(known), end="")
        return 0
    print_table(COLUMNS, [_row(known, name) for name in sorted(known.methods)])
    if known.starts:
        starts = sorted(f"{name} ({start.__module__.partition('.')[0]})" for name, start in known.starts.items())
        print(f"starts: {', '.join(starts)}")
    for kind, label in KINDS.items():
        found = sorted(f"{name} ({part.plugin})" for name, part in known.components.items() if part.kind == kind)
        if found:
            print(f"{label}: {', '.join(found)}")
    if known.tables:
        print(f"tables: {', '.join(f'builtin:{name}' for name in known.tables)}")
    if formats := [name for name in known.formats if name not in FORMATS]:
        print(f"formats: {', '.join(formats)}")
    for plugin in known.blocked:
        print(f"blocked: {plugin} by -p no:{plugin}")
    for error in known.duplicates.values():
        print(f"refused: {error}")
    for plugin, cause in known.failed.items():
        print(f"failed: {plugin}: {one_line(cause)}")
    for plugin, names in known.slow.items():
        print(f"slow: {plugin} imports {', '.join(names)} while it is loaded; functions should import them inside")
    for plugin, seconds in known.seconds.items():
        if plugin not in known.slow:
            print(f"slow: {plugin} takes {seconds:.1f} s to load; what takes long belongs inside its functions")
    for plugin, text in known.printed.items():
        first = text.splitlines()[0]
        print(f'prints: {plugin} prints "{first}" while it is loaded, to standard error; it should print nothing there')
    for plugin, changes in known.changed.items():
        print(f"changes: {plugin} {' and '.join(changes)} while it is loaded; it should leave the process as it is")
    return 0


def markdown_table(known: Registry) -> str:
    """The same facts for a README, without versions, papers linked."""
    columns = [column for column in COLUMNS if column != "Version"]
    rows = [columns, ["---"] * len(columns)]
    for name in sorted(known.methods):
        cells = dict(zip(COLUMNS, _row(known, name), strict=True))
        paper = known.methods[name].paper
        cells["Paper"] = f"[{cells['Paper']}](https://arxiv.org/abs/{paper})" if paper else cells["Paper"]
        rows.append([cells[column] for column in columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(known: Registry, name: str) -> tuple[str, ...]:
    method: type[Method] = known.methods[name]
    provider = known.providers[name]
    return (
        name,
        f"arXiv:{method.paper}" if method.paper else "-",
        provider.package,
        provider.version,
        "yes" if method.mergeable else "no",
        "yes" if method.starts_at_base else "no",
        method.export,
    )
