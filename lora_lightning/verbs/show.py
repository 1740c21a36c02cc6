"""Show one method's card: idea, paper, every setting with its default, README."""

from __future__ import annotations

import argparse
import inspect

from lora_lightning.cards import fields_of, readme_of
from lora_lightning.plugins import registry
from lora_lightning.tables import console, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method's name."""
    parser.add_argument("name", metavar="NAME", help="name of an installed method, as `methods` lists it")


def run(args: argparse.Namespace) -> int:
    """Print the card.

    Raises:
        UnknownMethodError: no such method.
    """
    from rich.markdown import Markdown

    method = registry().method(args.name, where="show")
    provider = registry().providers[args.name]
    print(f"{args.name}: {inspect.getdoc(method)}\n")
    if method.paper:
        print(f"paper      https://arxiv.org/abs/{method.paper}")
    print(f"plugin     {provider.plugin}, from {provider.package} {provider.version}")
    print(f"mergeable  {'yes' if method.mergeable else 'no'}")
    print(f"start      {'the base model' if method.starts_at_base else 'not the base model'}")
    print(f"export     {method.export}\n")
    print_table(
        ("Setting", "Type", "Default", "Meaning"),
        [(card.name, card.type, card.default, card.text) for card in fields_of(method)],
    )
    if readme := readme_of(method):
        console().print(Markdown(readme))
    return 0
