"""Show a card: method, start, optimizer, callback, data module or strategy."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from lora_lightning.cli.cards import FieldCard, arguments_of, description_of, fields_of, page_of, readme_of
from lora_lightning.cli.classes import provider_of
from lora_lightning.cli.console import console, print_table
from lora_lightning.errors import PluginError, SettingsError, nearest
from lora_lightning.methods import Method
from lora_lightning.plugins import registry
from lora_lightning.registry import SETTINGS, Component, one_line
from lora_lightning.start_values import Start


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
    component = known.component(args.name)
    if args.name in known.methods or args.name in known.duplicates:
        _show_method(args.name, args.card)
    elif args.name in known.starts:
        _show_start(known.starts[args.name], args.card)
    elif component is not None:
        _show_component(component)
    else:
        _refuse(args.name)
    return 0


def _refuse(name: str) -> None:
    """Say what is nearest to a name that nothing has."""
    known = registry()
    components = [other for kind in SETTINGS for other in known.component_names(kind)]
    components += known.starts
    close = nearest(name, [*known.methods, *components], n=1)
    if close and close[0] in components and not known.failed:  # else it may be a failed plugin's, which is named below
        raise SettingsError(
            f'show: no method, start, optimizer, callback, data module or strategy "{name}". Did you mean "{close[0]}"?'
        )
    known.method(name, where="show")


def _show_method(name: str, whole: bool) -> None:
    method = registry().method(name, where="show")
    provider = registry().providers[name]
    print(f"{name}: {inspect.getdoc(method)}\n")
    if method.paper:
        print(f"paper      https://arxiv.org/abs/{method.paper}")
    print(f"plugin     {provider.plugin}, from {provider.package} {provider.version}")
    print(f"elsewhere  class_path: {_shortest(method, name)}, in a LightningCLI of your own")
    print(f"mergeable  {'yes' if method.mergeable else 'no'}")
    print(f"start      {'the base model' if method.starts_at_base else 'not the base model'}")
    print(f"export     {method.export}\n")
    _print_settings(fields_of(method))
    _print_page(method, whole)


def _show_start(start: type[Start], whole: bool) -> None:
    print(f"{start.__name__}: {inspect.getdoc(start)}\n")
    if start.paper:
        print(f"paper      https://arxiv.org/abs/{start.paper}")
    print("kind       start, named in model.method.init")
    print(f"elsewhere  class_path: {_shortest(start, start.__name__)}, in a LightningCLI of your own")
    print(f"start      {'taken off again: the base model' if start.subtracts else 'not taken off'}\n")
    _print_settings(fields_of(start))
    _print_page(start, whole)


def _print_page(cls: type[Method] | type[Start], whole: bool) -> None:
    """The card of the folder that a class lies in, or its first part."""
    from rich.markdown import Markdown

    name, readme = cls.__name__, readme_of(cls)
    page, left = (readme, []) if whole else page_of(readme)
    if readme:
        console().print(Markdown(page))
    if left:
        print(f"\nshow {name} --card adds: {', '.join(left)}.")


def _shortest(cls: type, name: str) -> str:
    """The shortest path by which a class can be imported: of the packages it lies in, the first that hands it on."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if getattr(sys.modules.get(package), name, None) is cls:
            return f"{package}.{name}"
    return f"{cls.__module__}.{name}"


def _show_component(component: Component) -> None:
    try:
        cls = component.load()
    except Exception as error:
        raise PluginError(f"show: {component.kind} {component.name} cannot be imported: {one_line(error)}.") from error
    print(f"{component.name}: {description_of(cls)}\n")
    print(f"kind       {component.kind}, named in {SETTINGS[component.kind]}")
    print(f"package    {provider_of(component)}")
    print(f"elsewhere  class_path: {component.class_path}, in a LightningCLI of your own")
    if getattr(cls, "bibtex", ""):
        print("paper      cite CONFIG prints its BibTeX entry")
    print()
    _print_settings(arguments_of(cls))


def _print_settings(cards: Sequence[FieldCard]) -> None:
    print_table(
        ("Setting", "Type", "Default", "Meaning"), [(card.name, card.type, card.default, card.text) for card in cards]
    )
