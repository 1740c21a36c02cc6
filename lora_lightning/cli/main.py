"""One command line, from its words to an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from lora_lightning import plugins
from lora_lightning.cli import command_line, configs
from lora_lightning.cli.other_tools import VERBS
from lora_lightning.cli.system_errors import DEBUG, system_error
from lora_lightning.errors import LoraLightningError, did_you_mean
from lora_lightning.plugin_code import imported
from lora_lightning.registry import LIGHT_VERBS, one_line
from lora_lightning.version import __version__

TRAINING = {
    "fit": "Train an adapter; --resume DIR continues a run.",
    "validate": "Evaluate on the validation data; --run DIR takes a run's settings and weights.",
    "test": "Evaluate on the test data; --run DIR as above.",
    "predict": "Predict; --run DIR as above, --output FILE names the .csv or .jsonl file.",
}

HELP = """usage: python -m lora_lightning VERB ...

{verbs}

Anywhere: -p no:NAME leaves plugin NAME out; --config NAME|PATH reads a config, later ones and flags win.
Configs here: {configs}
A verb's own flags: python -m lora_lightning VERB --help"""


class VerbParser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise LoraLightningError(f"{self.prog.rpartition(' ')[2]}: {message}.")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line, by default the program's; returns the exit code.

    An error that a user can mend is one line on stderr, and 2.
    """
    try:
        return _run(sys.argv[1:] if args is None else args)
    except LoraLightningError as error:
        return told(error)
    except OSError as error:
        if (ours := system_error(error)) is None:
            raise
        return told(ours)
    except SystemExit as stop:  # a parser has printed its help or its error
        if isinstance(stop.code, str):
            raise
        return stop.code or 0


def told(error: LoraLightningError) -> int:
    """Print an error as one line; its exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _run(words: Sequence[str]) -> int:
    line = command_line.read(words)
    if not line.rest or (line.verb is None and {"-h", "--help"} & set(line.rest)):
        plugins.load(line.blocked)
        print(help_text())
        return 0
    if line.verb is None and "--version" in line.rest:
        print(f"lora_lightning {__version__}")
        return 0
    if line.verb in TRAINING:
        return int(importlib.import_module("lora_lightning.cli.lightning").main(words))
    if line.verb in LIGHT_VERBS:
        plugins.load(line.blocked)  # first: a verb's help may name what they bring
        verb = _verb(line.verb)
        return int(verb.run(_parse(line, verb)))
    commands = plugins.load(line.blocked).commands
    if line.verb not in commands:
        found = f'no verb "{line.verb}".' if line.verb else "the verb comes first."
        known = (*TRAINING, *LIGHT_VERBS, *commands)
        meant = VERBS.get(line.verb or "")
        hint = f' Here it is "{meant}".' if meant else did_you_mean(line.verb or "", known)
        raise LoraLightningError(f"{found}{hint} Verbs: {', '.join(known)}.")
    return _of_plugin(line, commands[line.verb])


def _of_plugin(line: command_line.Line, module: str) -> int:
    """The exit code of a plugin's verb, whose errors are the plugin's; `LORA_LIGHTNING_DEBUG` brings the traceback."""
    try:
        verb = imported(module)
        return int(verb.run(_parse(line, verb)))
    except (LoraLightningError, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        plugin = plugins.registry().owners[str(line.verb)]
        raise LoraLightningError(
            f"{line.verb}: it failed in {module}, of the plugin {plugin} ({' '.join(plugins.package_of(plugin))}): "
            f"{one_line(error)}. The environment variable {DEBUG}=1 brings the traceback."
        ) from error


def help_text() -> str:
    """Verbs with one line each, our own flags, and the configs at hand."""
    lines = TRAINING | {name: _first_line(_verb(name)) for name in LIGHT_VERBS}
    for name, module in plugins.registry().commands.items():
        try:
            lines[name] = _first_line(imported(module))
        except Exception as error:  # a broken plugin never takes the help down
            lines[name] = f"failed: {one_line(error)}"
    verbs = "\n".join(f"  {name:<14}{text}" for name, text in lines.items())
    return HELP.format(verbs=verbs, configs=", ".join(configs.config_names()) or "none")


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").split("\n", 1)[0]


def _verb(name: str) -> ModuleType:
    return importlib.import_module(f"lora_lightning.cli.verbs.{name.replace('-', '_')}")


def _parse(line: command_line.Line, verb: ModuleType) -> argparse.Namespace:
    """A verb's arguments. A verb with `flags` passes on what it does not know, a config's name first; else an error."""
    description = (verb.__doc__ or "").strip()
    parser = VerbParser(f"python -m lora_lightning {line.verb}", description=description, allow_abbrev=False)
    verb.add_arguments(parser)
    args, others = parser.parse_known_args(line.rest[1:])
    if "flags" in args:
        named = others and not others[0].startswith("-")
        args.flags = [*(["--config"] if named else []), *others, *(f"-p=no:{name}" for name in line.blocked)]
    elif others:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = others[0].partition("=")[0]
        raise LoraLightningError(f'{line.verb}: it takes no "{word}".{did_you_mean(word, flags)}')
    return args
