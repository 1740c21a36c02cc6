"""Write a trained adapter for peft, for a server, as a plain model, or as dense updates, and upload it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_lightning.errors import ExportError, RunFolderError
from lora_lightning.plugins import registry
from lora_lightning.registry import SERVERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from, where to, and how."""
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", type=Path, help="a run folder, or an adapter folder")
    servers = "|".join(SERVERS)
    parser.add_argument("--format", metavar="|".join(registry().formats), help="what to write; or give --for")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="a new folder")
    parser.add_argument(
        "--for",
        dest="server",
        metavar=servers,
        help="who will serve it: says what that refuses, and converts what is exact in another form; fit and doctor "
        "say it before training where the config has serve_with",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="largest rank for peft and gguf; what is cut is reported")
    parser.add_argument("--dtype", metavar="bfloat16|float16|float32", help="of a merged model, or of gguf's factors")
    parser.add_argument("--quantize", metavar="nf4|nf4-double", help="a merged model, by bitsandbytes")
    parser.add_argument("--pretrained", metavar="MODEL", help="the base model, where the adapter's own is not at hand")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the hub, once it is verified")
    parser.add_argument("--private", action="store_true", help="make a new repository of --push private")


def run(args: argparse.Namespace) -> int:
    """Export and print what was written.

    Raises:
        RunFolderError: a run without an adapter.
        ExportError: the adapter cannot be written so, or not be uploaded.
        PluginError: the plugin that brings the format fails.
    """
    if args.format is None and args.server is None:
        raise ExportError(f"--format or --for is needed: {', '.join(registry().formats)}; {', '.join(SERVERS)}.")
    if args.private and args.push is None:
        raise ExportError("--private says nothing without --push OWNER/NAME.")
    from lora_lightning.exporters.from_folder import export_folder
    from lora_lightning.exporters.push import check_push, push

    if args.push is not None:
        check_push(args.push)
    options = {name: getattr(args, name) for name in ("rank", "pretrained", "server", "dtype", "quantize")}
    report = export_folder(adapter_folder(args.source), args.output, args.format, **options)
    print(report)
    if args.push is not None:
        print(f"pushed to {push(report, args.push, args.private)}")
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
