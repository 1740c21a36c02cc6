"""Errors of the configuration parser in the words of this project: key, value, rule, nearest valid choice.

jsonargparse reports a problem as an indented tree: keys (`Parser key "..."`), classes (`Problem with given
class_path '...'`) and, at the leaves, what was wrong, once for every type that the value might have had. `explain`
reads that tree, picks the leaf the user most likely meant, and says it in one line. Text it does not know comes out as
it is, on one line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_lightning import plugins
from lora_lightning.cli import configs
from lora_lightning.cli.classes import (
    bases_of,
    hint_of,
    imported_class,
    namesakes,
    noun,
    parameters_of,
    short_names,
    takes_method,
)
from lora_lightning.errors import did_you_mean
from lora_lightning.registry import TRAINING_VERBS

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_FACTORY = re.compile(r"expects a function or a callable class: ")
_LEAVES = {  # the most telling first
    "field": re.compile(r"(?:Group '(?P<group>[^']+)' does not accept o|Subcommand '\w+' does not accept o|O)ption"
                        r" '(?P<word>[^']+)'"),
    "required": re.compile(r"the following arguments are required: (?P<word>.+)"),
    "import": re.compile(r"(?P<word>No module named '[^']+'|module '[^']+' has no attribute '[^']+')"),
    "foreign": re.compile(r"(?:Import path (?P<word>\S+) )?does not correspond to a subclass of|to be a subclass of"),
    "name": re.compile(r"Expected a dot import path string: (?P<word>\S+)"),
    "unnamed": re.compile(r"Expected an instantiatable class|Not a valid subclass of \w+\. Got value"),
    "value": re.compile(r"Expected a (?P<word>.+?)(?:\. Got value: .*)?$"),
}  # fmt: skip
_NOISE = re.compile(r"Expected a path but|\(class path given previously\)")
_OTHER_TYPES = re.compile(r"Expected an? |Not a valid subclass of ")
_GIVEN = re.compile(r"(?:Got value|Given value): (.*?)(?:\. Got value: .*)?$", re.MULTILINE)
_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null",
          "list": "a list", "dict": "a mapping", "tuple": "a list"}  # fmt: skip


def explain(message: str, parser: argparse.ArgumentParser) -> str:
    """One line for `message` of a jsonargparse parser, whose arguments give the valid keys."""
    if unknown := re.match(r"unrecognized arguments: (.+)", message):
        return _unknown_flags(unknown[1].split(), parser)
    if flag := re.match(r"argument --(\S+): expected one argument", message):
        return f"{flag[1]}, or a setting in it, is given without a value."
    if text := re.match(r'Parser key "([^"]+)":\s+Unable to load config \'(.+?)\'', message):
        return f'{text[1]} is "{text[2]}"; it must be a mapping of settings, or a file with one.'
    if text := re.match(r"Problems parsing config: (.+)", message, re.DOTALL):
        return f"a config is not valid YAML: {' '.join(text[1].split())}"
    if text := re.match(r"Unexpected config: (.+)", message):
        return f'a config must be a mapping of settings; this one is "{text[1]}".'
    leaves = _leaves(message)
    if leaves:
        return _say(_told(leaves), leaves, parser)
    return " ".join(_KEY.sub(r"\1:", message).split())


def place(message: str) -> tuple[str, str] | None:
    """The setting that `explain` speaks of, with the class named there, where taking it away would mend the error.

    The key is the full one of a config, without `init_args`, or that of an unknown flag. None where something is
    missing, or nothing can be read.
    """
    if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
        return unknown[1].lstrip("-"), ""
    if text := re.match(
        r"(?:argument --(\S+): expected one argument|Parser key \"([^\"]+)\":\s+Unable to load)", message
    ):
        return text[1] or text[2], ""
    leaves = _leaves(message)
    if not leaves:
        key = _KEY.search(message)
        return (key[1], "") if key else None
    leaf = _told(leaves)
    if leaf.kind == "required":
        return (leaf.key, leaf.class_path) if leaf.trail else None
    if leaf.kind == "field":
        return ".".join(filter(None, (leaf.key, leaf.word))), leaf.class_path if leaf.trail else ""
    return leaf.key, leaf.class_path


def missing(message: str) -> list[str]:
    """Keys of required settings that a message says are missing."""
    leaves = _leaves(message)
    leaf = _told(leaves) if leaves else None
    return leaf.word.split(", ") if leaf is not None and leaf.kind == "required" and not leaf.trail else []


def refused(message: str) -> str:
    """One line for what a class said that could not be made, where a text lists all types the value might have had.

    Empty where it lists nothing that a class said.
    """
    tried, _, given = message.partition("\nGiven value type: ")
    _, *said = tried.partition("\nErrors:")[2].split("\n  - ")
    said = [text for text in said if not _OTHER_TYPES.match(text)]
    if not said:
        return ""
    paths = _CLASS.findall(said[0]) or re.findall(r"class_path='([^']+)'", given)
    text = " ".join(_CLASS.sub("", said[0]).split()).lstrip(": ")
    name = paths[-1].rpartition(".")[2] if len(set(paths)) == 1 else ""
    return text if name in text else f"{name}: {text}"


def _told(leaves: Sequence[Leaf]) -> Leaf:
    """The one that the user most likely meant."""
    return min(leaves, key=lambda leaf: (-len(leaf.trail), list(_LEAVES).index(leaf.kind)))


@dataclass(frozen=True)
class Leaf:
    """One thing that is wrong."""

    kind: str
    """Key of `_LEAVES`."""
    word: str
    """What the pattern caught: a field, a class, a type."""
    trail: tuple[tuple[str, str], ...]
    """("key", name) and ("class", path), outermost first."""
    value: str
    """The offending value as text, where the message has it."""

    @property
    def key(self) -> str:
        """Path of the setting."""
        return ".".join(name for kind, name in self.trail if kind == "key")

    @property
    def class_path(self) -> str:
        """The class to which the field belongs, or that could not be used."""
        if self.trail and self.trail[-1][0] == "class":
            return self.trail[-1][1]
        given = re.search(r"class_path'?[:=] ?'([^']+)'", self.value)
        return given[1] if given else self.value


def _leaves(message: str) -> list[Leaf]:
    found: list[Leaf] = []
    trail: list[tuple[int, str, str]] = []
    lines = message.splitlines()
    for number, line in enumerate(lines):
        text = line.lstrip(" -").rstrip()
        if not text or _NOISE.search(text):
            continue
        indent = len(line) - len(line.lstrip(" "))
        trail = [part for part in trail if part[0] < indent]
        trail += [(indent, "key", name) for name in _KEY.findall(text)]
        trail += [(indent, "class", path) for path in _CLASS.findall(text)]
        given = _GIVEN.search("\n".join([text, *lines[number + 1 :]]))
        leaf = _leaf(text, [part[1:] for part in trail], given[1] if given else "")
        found += [leaf] if leaf else []
    return _without_class_where_number(found)


def _leaf(text: str, trail: list[tuple[str, str]], value: str) -> Leaf | None:
    """What one line says is wrong, if anything."""
    if _FACTORY.search(text) and (path := re.search(r"class_path='([^']+)'", text)):
        trail = [*trail, ("class", path[1])]
    for kind, pattern in _LEAVES.items():
        if match := pattern.search(text):
            word = ".".join(part for part in match.groupdict().values() if part)
            return Leaf(kind, word, tuple(trail), value)
    return None


def _without_class_where_number(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Where a number would do as well, nobody meant the name of a class."""
    numbers = {leaf.key for leaf in leaves if leaf.kind == "value" and re.search(r"'(int|float)'", leaf.word)}
    return [leaf for leaf in leaves if leaf.kind != "name" or leaf.key not in numbers]


def _say(leaf: Leaf, leaves: Sequence[Leaf], parser: argparse.ArgumentParser) -> str:
    if leaf.kind == "field" and not leaf.trail:
        return _unknown_key(leaf.word, parser)
    if leaf.kind == "required" and not leaf.trail:
        return _required(leaf.word.split(", "), parser)
    bases = bases_of(hint_of(leaf.trail, parser))
    if leaf.kind == "value" and len(paths := namesakes(bases, leaf.class_path)) > 1:
        return f'{leaf.key}: "{leaf.class_path}" is {" and ".join(paths)}; give the full path of the one that is meant.'
    if leaf.kind == "value":
        return _wrong_value(leaf, [other.word for other in leaves if other.kind == "value" and other.key == leaf.key])
    say: dict[str, Callable[[Leaf, Sequence[type]], str]] = {
        "field": _unknown_field,
        "required": _missing_field,
        "import": _not_importable,
        "foreign": _foreign,
        "name": _unknown_name,
        "unnamed": _unnamed,
    }
    return f"{leaf.key}: {say[leaf.kind](leaf, bases)}".rstrip()


def _unknown_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    flags = [word.partition("=")[0].lstrip("-") for word in words if word.startswith("--")]
    if not flags and (words[0] in configs.config_names() or words[0].endswith((".yaml", ".yml", ".json"))):
        return f'"{words[0]}" is a config; give it as --config {words[0]}.'
    if not flags:
        return f'"{words[0]}" is no setting; settings are given as --key value, values with blanks in quotes.'
    return " ".join(_unknown_key(flag, parser) for flag in flags)


def _unknown_key(key: str, parser: argparse.ArgumentParser) -> str:
    known = [action.dest for action in parser._actions if not action.dest.endswith(("help", "print_config"))]
    known = [dest for dest in known if dest != argparse.SUPPRESS] + ["run", "resume"]
    text = f'no setting "{key}".{did_you_mean(key, known)}'
    group = key.rpartition(".")[0]
    below = [dest.removeprefix(f"{group}.") for dest in known if group and dest.startswith(f"{group}.")]
    siblings = list(dict.fromkeys(dest.partition(".")[0] for dest in below))
    if not siblings:
        tops = sorted({dest.partition(".")[0] for dest in known})
        return text if did_you_mean(key, known) else f"{text} Top level: {', '.join(tops)}."
    return text if len(siblings) > 24 else f"{text} {group} takes: {', '.join(siblings)}."


def _required(keys: Sequence[str], parser: argparse.ArgumentParser) -> str:
    verb = keys[0].partition(".")[0]
    if verb in TRAINING_VERBS:
        keys = [key.removeprefix(f"{verb}.") for key in keys]
    if len(keys) > 1:
        names = configs.config_names()
        known = f"; there are: {', '.join(names)}" if names else ""
        return f"{', '.join(keys)} are required: give them in a config (--config NAME{known}), or as flags."
    bases = bases_of(hint_of([("key", keys[0])], parser))
    return f"{keys[0]} is required: give it in a config (--config NAME), or as --{keys[0]}. {_choices(bases)}".rstrip()


def _wrong_value(leaf: Leaf, types: Iterable[str]) -> str:
    choices = [choice for kind in types for choice in re.findall(r"'([^']*)'", kind) if "Literal" in kind]
    kinds = [f'"{choice}"' for choice in choices]
    for kind in types:
        if "Literal" not in kind:
            name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
            kinds.append(_TYPES.get(name, name))
    rule = " or ".join(dict.fromkeys(kinds))
    return f'{leaf.key} is "{leaf.value}"; it must be {rule}.{did_you_mean(leaf.value, choices)}'


def _unknown_field(leaf: Leaf, bases: Sequence[type]) -> str:
    owner = imported_class(leaf.class_path)
    if owner in bases:
        return _unnamed(leaf, bases)
    fields = [] if owner is None else parameters_of(owner)
    takes = f" It takes: {', '.join(fields)}." if fields else ""
    return f'{leaf.class_path.rpartition(".")[2]} has no "{leaf.word}".{did_you_mean(leaf.word, fields)}{takes}'


def _not_importable(leaf: Leaf, bases: Sequence[type]) -> str:
    path = leaf.class_path
    text = f"cannot import {path}: {leaf.word}."
    missing = re.findall(r"'([^']+)'", leaf.word)[0]
    if not f"{path}.".startswith(f"{missing}."):  # the module is there; something that it imports is not
        return text
    return f"{text}{_advice(path.rpartition('.')[2], bases)}"


def _missing_field(leaf: Leaf, bases: Sequence[type]) -> str:  # noqa: ARG001 - one signature for all kinds
    return f"{leaf.class_path.rpartition('.')[2]} needs {leaf.word}."


def _foreign(leaf: Leaf, bases: Sequence[type]) -> str:
    return f"{leaf.word or leaf.class_path} is no {noun(bases)}. {_choices(bases)}"


def _unknown_name(leaf: Leaf, bases: Sequence[type]) -> str:
    if takes_method(bases):
        return plugins.registry().explain_unknown(leaf.word)
    unusable = plugins.registry().explain_unusable(leaf.word)
    return unusable or f'no {noun(bases)} "{leaf.word}".{_advice(leaf.word, bases)}'


def _unnamed(leaf: Leaf, bases: Sequence[type]) -> str:
    return (
        f"no {noun(bases)} is named. Write {leaf.key}: NAME or {leaf.key}: {{class_path: NAME, init_args: {{...}}}}, "
        f"before any setting of it. {_choices(bases)}"
    )


def _advice(word: str, bases: Sequence[type]) -> str:
    """The nearest name, and all names where there is none or they are few."""
    names = short_names(bases)
    close = did_you_mean(word, names)
    return close if close and len(names) > 12 else f"{close} {_choices(bases)}"


def _choices(bases: Sequence[type]) -> str:
    names = short_names(bases)
    return f"Installed: {', '.join(names)}." if 0 < len(names) <= 60 else ""
