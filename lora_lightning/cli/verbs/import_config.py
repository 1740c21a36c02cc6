"""Turn a config of LLaMA-Factory, axolotl or peft into one of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_lightning.errors import RunFolderError, SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file, and where to."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a YAML of LLaMA-Factory or axolotl, or peft's adapter_config.json"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="where to write it; else it is printed")


def run(args: argparse.Namespace) -> int:
    """Print the YAML, with what is not carried over in comments; or write it, and print those.

    Raises:
        SettingsError: the file is of no tool that is read, or the output exists.
        RunFolderError: the output cannot be written.
    """
    from lora_lightning.cli.imports.files import translated

    found = translated(args.file)
    text = found.text(str(args.file))
    if args.output is None:
        print(text, end="")
        return 0
    if args.output.exists():
        raise SettingsError(f'--output is "{args.output}", which exists; name another file, or remove it.')
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f'cannot write "{args.output}": {error.strerror}.') from error
    for name, why in found.lost.items():
        print(f"not carried over: {name}: {why}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"config: {args.output}")
    return 0
