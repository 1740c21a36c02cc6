"""A command line whose settings can be taken away one by one, so that a parser goes on to the next error."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader

from lora_lightning.cli.explain import explain, missing, place
from lora_lightning.cli.parser import Parser
from lora_lightning.errors import PluginError


@dataclass(frozen=True)
class Parsed:
    """What is left of a command line, and what was wrong.

    Attributes:
        settings: None where an error could not be taken away; there may then be more.
        lines: one for each error.
        gone: keys of the settings that were taken away.
    """

    settings: Namespace | None
    lines: list[str]
    gone: list[str]


def parse_all(parser: Parser, words: Sequence[str], folder: Path) -> Parsed:
    """What is left of a command line without the settings that cannot be parsed, and a line for each of those.

    Args:
        parser: without verbs; what it requires is optional afterwards.
        words: the command line.
        folder: where repaired configs are written.
    """
    line = CommandLine(words, folder)
    lines: list[str] = []
    gone: list[str] = []
    parser.exit_on_error = False
    while True:
        try:
            return Parsed(parser.parse_args(line.words()), lines, gone)
        except (argparse.ArgumentError, PluginError) as error:
            message = str(error)
            required = missing(message)
            if required:
                lines += _missing(parser, required, gone)
                _make_optional(parser, required)
                continue
            blocked = (message.partition(":")[0], "") if isinstance(error, PluginError) else None
            where = blocked or place(message)
            consequence = where is not None and any(key.startswith(f"{where[0]}.") for key in gone)
            if not consequence:  # else: a class that needs what was taken away
                lines.append(message if blocked else explain(message, parser))
            if where is None or not line.remove(*where):
                return Parsed(None, lines, gone)
            gone.append(where[0])


def _missing(parser: Parser, keys: Sequence[str], gone: Sequence[str]) -> list[str]:
    """A line for each key that was never given."""
    return [
        explain(f"the following arguments are required: {key}", parser)
        for key in keys
        if not any(f"{key}.".startswith(f"{other}.") for other in gone)
    ]


def _make_optional(parser: Parser, keys: Sequence[str]) -> None:
    for action in parser._actions:
        if action.dest in keys:
            action.required = False
    parser._extra_required_keys.difference_update(keys)


class CommandLine:
    """Words, with configs as trees where something has been taken out of them."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._words = list(words)
        self._trees: dict[int, Any] = {}
        """Config by the place of its name among the words."""

    def words(self) -> list[str]:
        """What the parser is given: the words, repaired configs by the names of their copies."""
        return [str(self._copy(n)) if n in self._trees else word for n, word in enumerate(self._words)]

    def remove(self, key: str, named: str) -> bool:
        """Take a setting out of every config and flag; says whether there was one.

        Args:
            key: dotted, without `init_args`.
            named: the class that the setting names or belongs to, to find it in a list; may be empty.
        """
        found = self._remove_flags(lambda flag: f"{flag}.".startswith(f"{key}."))
        for n, word in enumerate(self._words):
            if n and self._words[n - 1] == "--config":
                tree = self._trees.get(n, _read(word))
                if _remove(tree, key.split("."), named.rpartition(".")[2]):
                    self._trees[n], found = tree, True
        return found or self._remove_flags(lambda flag: key.startswith(f"{flag}."))

    def _remove_flags(self, means: Callable[[str], bool]) -> bool:
        kept: list[str] = []
        trees: dict[int, Any] = {}
        n, found = 0, False
        while n < len(self._words):
            word = self._words[n]
            flag = word.partition("=")[0].lstrip("-").replace(".init_args", "").removesuffix("+")
            if word.startswith("--") and flag != "config" and means(flag):
                found = True
                valued = "=" not in word and n + 1 < len(self._words) and not self._words[n + 1].startswith("--")
                n += 1 + valued
                continue
            if n in self._trees:
                trees[len(kept)] = self._trees[n]
            kept.append(word)
            n += 1
        self._words, self._trees = kept, trees
        return found

    def _copy(self, n: int) -> Path:
        path = self._folder / f"{n}.yaml"
        path.write_text(yaml.safe_dump(self._trees[n]), encoding="utf-8")
        return path


def _read(config: str) -> Any:
    try:
        text = Path(config).read_text(encoding="utf-8")
    except OSError:  # YAML itself
        text = config
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return None


def _remove(node: Any, parts: Sequence[str], named: str) -> bool:
    if isinstance(node, list):
        return max((_remove(element, parts, named) for element in node if _class_of(element) == named), default=False)
    if not isinstance(node, dict):
        return False
    done = False
    for holder in (node, node.get("init_args")):
        for name in (parts[0], f"{parts[0]}+"):
            if not isinstance(holder, dict) or name not in holder:
                continue
            value = holder[name]
            if len(parts) > 1:
                done |= _remove(value, parts[1:], named)
                continue
            kept = [element for element in value if _class_of(element) != named] if isinstance(value, list) else []
            if kept and kept != value:
                holder[name] = kept
            else:
                del holder[name]
            done = True
    return done


def _class_of(node: Any) -> str:
    """The last part of a class's name, as far as a setting names one."""
    name = node.get("class_path") if isinstance(node, dict) else node
    return name.rpartition(".")[2] if isinstance(name, str) else ""
