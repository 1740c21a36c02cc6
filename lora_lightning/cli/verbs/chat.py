"""Talk to adapters and their base model in the terminal."""

from __future__ import annotations

import argparse
import sys

from lora_lightning.cli.answers.sampling import add_model_arguments, add_sampling_arguments, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Who answers, and how."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN|ADAPTER",
        help="run folders, adapter folders, folders of peft, hub ids; or the base model's name",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="the system text")
    parser.add_argument("--merged", choices=("auto", "yes", "no"), default="auto", help="auto: what is faster")
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load, and answer until it is left.

    Raises:
        LoraLightningError: a model or an adapter that cannot be loaded.
    """
    sampling = sampling_of(args)
    notes = sys.stdout if sys.stdout.isatty() else sys.stderr
    print("loading ...", file=notes, flush=True)

    from lora_lightning.cli.answers.terminal import Chat, lines_of
    from lora_lightning.cli.answers.voices import Voices

    voices = Voices(args.sources, args.pretrained, args.dtype, args.device)
    chat = Chat(voices, sampling, sys.stdout, notes)
    if len(voices.voices) > 1 and args.merged != "no":
        chat.say(voices.choose() if args.merged == "auto" else voices.merge_all())
    if args.system:
        chat.conversation.set_system(args.system, voices.current)
    chat.say("/help lists the commands")
    chat.run(lines_of(sys.stdin))
    return 0
