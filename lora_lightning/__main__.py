"""`python -m lora_lightning VERB ...`: light verbs at once, the rest when torch has been imported.

Each verb but the training ones is a module in `verbs/` with `add_arguments(parser)` and `run(args)`; the first line of
its docstring is its help.
"""

from __future__ import annotations

import os
import sys
import threading

from lora_lightning.cli.main import main

BROKEN_PIPE = 128 + 13
"""Exit code where the reader of the output has left: what shells report of a tool that SIGPIPE ends."""
INTERRUPT = 128 + 2
"""Exit code of a program that Ctrl-C ends: what shells report of one that SIGINT ends."""

HELD = 5.0
"""Seconds after its work from which on threads that keep the program alive are named."""


def program() -> int:
    """`main`, which ends without a word where the reader of its output has left, as `| head` does.

    Ctrl-C ends it with one, unless a `fit` that trains answers first. A process group is left before the interpreter
    ends: its threads need the interpreter.

    Raises:
        BrokenPipeError: of another pipe.
    """
    try:
        code = main()
        if distributed := sys.modules.get("lora_lightning.distributed"):  # light verbs never import torch
            distributed.leave_process_group()
        sys.stdout.flush()
        timer = threading.Timer(HELD, name_threads)
        timer.daemon = True
        timer.start()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPT
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
            return BROKEN_PIPE
        raise
    return code


def name_threads() -> None:
    """Say which threads the program, whose work is done, still waits for; those of pools have ended by themselves."""
    main_thread = threading.main_thread()
    held = [repr(one.name) for one in threading.enumerate() if not one.daemon and one is not main_thread]
    if held:
        print(
            f"note: the work is done, and the program waits for {', '.join(held)}: a thread that a plugin, callback or "
            "logger has started and not ended. Ctrl-C ends the program without it.",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(program())
