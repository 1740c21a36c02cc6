"""Say what works here, and everything that is wrong with a config."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from lora_lightning.cli.console import print_table
from lora_lightning.plugins import base_layer_kinds, registry
from lora_lightning.registry import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A config, and any flags of `fit`; none asks about the machine alone."""
    parser.usage = "%(prog)s [--config NAME|PATH ...] [flags of fit ...]"
    parser.set_defaults(flags=[])


def run(args: argparse.Namespace) -> int:
    """Print both; 1 where something is wrong, else 0."""
    print("looking at this machine ...", flush=True)
    problems = environment()
    settings = [word for word in args.flags if not word.startswith("-p=")]
    notes: list[str] = []
    if settings:
        from lora_lightning.cli.preflight.config import check_config

        print("\nlooking at the config ...", flush=True)
        found = check_config(args.flags)
        problems, notes = [*problems, *found.problems], found.notes
    print()
    for note in notes:
        print(f"note: {note}.")
    for problem in problems:
        print(f"problem: {problem}")
    what = "this machine and this config" if settings else "this machine"
    count = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "no problem"
    print(f"{count} found with {what}.")
    return 1 if problems else 0


def environment() -> list[str]:
    """Print what this machine and installation offer; returns what is wrong with them."""
    from lora_lightning.cli.classes import load_components
    from lora_lightning.cli.preflight import machine

    print_table(("Here", ""), [*machine.machine().items(), *machine.devices().items()])
    versions = machine.versions()
    print_table(
        ("Package", "Installed", "Needed", "Tested", "For"),
        [(v.name, v.installed or "-", v.allowed, v.tested or "-", v.extra or "all") for v in versions],
    )
    known = registry()
    load_components()  # so that what fails is known
    base_layer_kinds(known)
    by_plugin = {plugin: [n for n, p in known.providers.items() if p.plugin == plugin] for plugin in _plugins()}
    print_table(
        ("Plugin", "State", "Methods"),
        [
            *((name, "loaded", ", ".join(sorted(methods)) or "-") for name, methods in by_plugin.items()),
            *((name, "blocked", "-") for name in known.blocked),
            *((name, "failed", one_line(cause)) for name, cause in known.failed.items()),
        ],
    )
    print_table(("Strategy", "Works here", "Why not"), _verdicts(machine.strategies().items()))
    formats = [(f"{name} on {device}", why) for (name, device), why in machine.quantizations().items()]
    print_table(("Quantization", "Works here", "Why not"), _verdicts(formats))
    return [
        *(problem for version in versions if (problem := version.problem)),
        *(f"plugin {name} failed: {one_line(cause)}" for name, cause in known.failed.items()),
        *(str(error) for error in known.duplicates.values()),
    ]


def _plugins() -> list[str]:
    known = registry()
    return [name for name, _ in known.manager.list_name_plugin() if name not in known.failed]


def _verdicts(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(name, "no" if why else "yes", why) for name, why in rows]
