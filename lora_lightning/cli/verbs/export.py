"""Write a trained adapter for peft, as a plain model, or as dense updates."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_lightning.errors import RunFolderError
from lora_lightning.plugins import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to, and how."""
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", type=Path, help="a run folder, or an adapter folder")
    parser.add_argument("--format", required=True, metavar="|".join(registry().formats), help="what to write")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="a new folder")
    parser.add_argument("--rank", type=int, metavar="N", help="largest rank for peft; what is cut off is reported")
    parser.add_argument("--pretrained", metavar="MODEL", help="the base model, where the adapter's own is not at hand")


def run(args: argparse.Namespace) -> int:
    """Export and print what was written.

    Raises:
        RunFolderError: a run without an adapter.
        ExportError: the adapter cannot be written so.
        PluginError: the plugin that brings the format fails.
    """
    from lora_lightning.exporters.from_folder import export_folder

    adapter = adapter_folder(args.source)
    print(export_folder(adapter, args.output, args.format, rank=args.rank, pretrained=args.pretrained))
    return 0


def adapter_folder(source: Path) -> Path:
    """The adapter folder that a run folder holds, or `source` itself.

    Raises:
        RunFolderError: a run that has not finished.
    """
    if (source / "adapter").is_dir():
        return source / "adapter"
    if (source / "config.yaml").is_file():
        raise RunFolderError(
            f"{source} has no adapter/, which a fit writes when it has finished. "
            f"Continue it with fit --resume {source}, or give an adapter folder."
        )
    return source
