"""Show examples as the model will see them, loss mask included."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A config, how many examples, and any flags of `fit`."""
    parser.usage = "%(prog)s CONFIG [-n N] [flags of fit ...]"
    parser.add_argument("-n", type=int, default=3, metavar="N", help="how many examples (3)")
    parser.set_defaults(flags=[])


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print the first examples."""
    from lora_lightning.cli.lightning import build
    from lora_lightning.data.inspect import show_examples

    _, datamodule = build(args.flags)
    datamodule.prepare_data()
    datamodule.setup("fit")
    print(show_examples(datamodule, args.n))
    return 0
