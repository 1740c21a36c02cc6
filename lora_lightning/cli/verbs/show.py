"""Show a card: method, optimizer, callback, data module or strategy."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lora_lightning.cli.cards import FieldCard, arguments_of, description_of, fields_of, page_of, readme_of
from lora_lightning.cli.console import console, print_table
from lora_lightning.errors import SettingsError, nearest
from lora_lightning.plugins import registry

if TYPE_CHECKING:
    from lora_lightning.cli.components import Part

_SURELY = 0.85
"""Likeness from which on a name is a misspelt method, so that nothing needs to be imported to say so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name, and how much of its card."""
    parser.add_argument("name", metavar="NAME", help="what a config calls it, such as a method that `methods` lists")
    parser.add_argument(
        "--card", action="store_true", help="a method's whole card, with what was verified and measured"
    )


def run(args: argparse.Namespace) -> int:
    """Print the card.

    Raises:
        UnknownMethodError: no such method, and nothing else of that name.
        SettingsError: nothing of that name, where the nearest is no method.
    """
    known = registry()
    misspelt = args.name not in known.announced and get_close_matches(args.name, known.methods, cutoff=_SURELY)
    if args.name in known.methods or args.name in known.duplicates or misspelt:
        _show_method(args.name, args.card)
        return 0
    from lora_lightning.cli.components import parts

    others = parts()
    if args.name in others:
        _show_part(args.name, others[args.name])
        return 0
    close = nearest(args.name, [*known.methods, *others], n=1)
    if close and close[0] in others and not known.failed:  # else it may be a failed plugin's, which is named below
        raise SettingsError(
            f'show: no method, optimizer, callback, data module or strategy "{args.name}". Did you mean "{close[0]}"?'
        )
    known.method(args.name, where="show")
    return 0


def _show_method(name: str, whole: bool) -> None:
    from rich.markdown import Markdown

    method = registry().method(name, where="show")
    provider = registry().providers[name]
    print(f"{name}: {inspect.getdoc(method)}\n")
    if method.paper:
        print(f"paper      https://arxiv.org/abs/{method.paper}")
    print(f"plugin     {provider.plugin}, from {provider.package} {provider.version}")
    print(f"mergeable  {'yes' if method.mergeable else 'no'}")
    print(f"start      {'the base model' if method.starts_at_base else 'not the base model'}")
    print(f"export     {method.export}\n")
    _print_settings(fields_of(method))
    readme = readme_of(method)
    page, left = (readme, []) if whole else page_of(readme)
    if readme:
        console().print(Markdown(page))
    if left:
        print(f"\nshow {name} --card adds: {', '.join(left)}.")


def _show_part(name: str, part: Part) -> None:
    print(f"{name}: {description_of(part.cls)}\n")
    print(f"kind       {part.kind}, named in {part.setting}")
    print(f"package    {part.provider}")
    if getattr(part.cls, "bibtex", ""):
        print("paper      cite CONFIG prints its BibTeX entry")
    print()
    _print_settings(arguments_of(part.cls))


def _print_settings(cards: Sequence[FieldCard]) -> None:
    print_table(
        ("Setting", "Type", "Default", "Meaning"), [(card.name, card.type, card.default, card.text) for card in cards]
    )
