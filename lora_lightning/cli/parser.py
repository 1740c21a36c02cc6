"""The configuration parser of the command line: Lightning's, with our words and without its usage dump."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lora_lightning import plugins
from lora_lightning.cli import former_names
from lora_lightning.cli.nulls import nulls
from lora_lightning.cli.parser_errors import explain
from lora_lightning.errors import PluginError, SettingsError
from lora_lightning.methods import Method
from lora_lightning.start_values import Start

_NAMED = (Callback, LightningDataModule, Logger, LRScheduler, Optimizer, Strategy)
"""What settings name by a class."""


class Parser(LightningArgumentParser):
    """Ends with one line `error: ...` and exit code 2; `JSONARGPARSE_DEBUG` brings the original text and traceback.

    Classes are parsed by parsers of their own. Those do not exit; what they say is explained by the outermost, which
    knows the keys around it.
    """

    def __init__(self, *args: Any, parser_mode: str = former_names.MODE, **options: Any) -> None:
        super().__init__(*args, parser_mode=parser_mode, **options)

    def print_usage(self, file: Any = None) -> None:
        """Nothing: usage is a page long and hides the error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the explanation of `message` and exit with 2."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        sys.stderr.write(f"error: {explain(message, getattr(ex, 'subcommand_parser', None) or self)}\n")
        self.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse, and refuse classes of blocked plugins, which a full path would import."""
        words = sys.argv[1:] if args is None else args
        with plugins.names_kept(_NAMED), former_names.understood(words) as current:
            config = super().parse_args(current, *others, **options)
        try:
            for key, class_path in class_paths(config.as_dict()):
                plugins.registry().refuse_blocked(class_path, key)
            for text in nulls(config, self):
                raise SettingsError(text)
        except (PluginError, SettingsError) as error:
            if not self.exit_on_error:
                raise
            sys.stderr.write(f"error: {error}\n")
            self.exit(2)
        return config


def class_paths(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and class paths in parsed settings, outer classes before those inside."""
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield key, node["class_path"]
        for name, value in node.items():
            yield from class_paths(value, ".".join(filter(None, (key, name))))
    elif isinstance(node, list):
        for value in node:
            yield from class_paths(value, key)


def parser_of(settings: Mapping[str, Any]) -> Parser:
    """A parser of some settings, given by their types, that raises what another would print."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_enabled=[Method, Start])
    parser = Parser(exit_on_error=False)
    for name, kind in settings.items():
        parser.add_argument(f"--{name}", type=kind)
    return parser


def method_from_yaml(text: str) -> Method:
    """The method that `text`, YAML with the key `method`, means to the command line."""
    parser = parser_of({"method": Method})
    method: Method = parser.instantiate(parser.parse_string(text)).method
    return method
