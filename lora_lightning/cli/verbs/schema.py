"""Print a JSON schema of configs, plugins included, for completion in editors."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but which plugins to leave out."""
    parser.usage = "%(prog)s [-p no:NAME] > lora_lightning.schema.json"


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 - the signature of all verbs
    """Print it."""
    import json

    from lora_lightning.cli.shell.schema import config_schema
    from lora_lightning.plugins import registry

    print(json.dumps(config_schema(tuple(registry().blocked)), indent=1))
    return 0
