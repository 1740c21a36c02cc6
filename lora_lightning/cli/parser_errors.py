"""The configuration parser's errors on one line, with the name of the class and the nearest valid choice.

jsonargparse says where a problem lies (`Parser key "..."`, `class_path '...'`, each further in than the one before) and
under that what is wrong, once for every type that the value might have had. `explain` takes the first sentence of those
furthest in. It stays as it is unless it does not tell what would be right: where a class, a field or a key is unknown,
a setting is missing, or a value has a wrong type.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from lora_lightning import plugins
from lora_lightning.cli import configs, other_tools
from lora_lightning.cli.classes import (
    bases_of,
    hint_of,
    imported_class,
    noun,
    parameters_of,
    short_names,
    takes_method,
)
from lora_lightning.errors import did_you_mean
from lora_lightning.registry import TRAINING_VERBS

_WHERE = re.compile(r"""Parser key "(?P<key>[^"]+)":|class_path'?[ :=]+'(?P<cls>[^']+)'""")
_FRAME = ("Expected a path but", "Does not validate", "Subtypes: ", "Given value", "Unable to load config '")
"""Beginnings of lines that only repeat what others say."""
_WORDS = {
    'Unable to load config "': 'it must be a mapping of settings, or a file with one; this is "',
    "Unexpected config: ": "a config must be a mapping of settings, which this is not: ",
    "Problems parsing config: ": "a config is not valid YAML: ",
    ": expected one argument": ", or a setting in it: expected one argument",
}
"""Sentences of the parser that say too little."""
_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null",
          "list": "a list", "dict": "a mapping", "tuple": "a list"}  # fmt: skip

_READ = {"{": "a mapping", "[": "a list", "True": "true", "False": "false"}
"""What YAML has made of a text, by how Python shows it."""


class Problem(NamedTuple):
    """One thing that is wrong."""

    text: str
    """What the parser says of it."""
    value: str
    """The offending value, where the message has it."""
    trail: tuple[tuple[str, str], ...]
    """("key", name) and ("class", path) of what lies around it, outermost first."""

    @property
    def key(self) -> str:
        """Path of the setting; the parser repeats that of a section."""
        return ".".join(dict.fromkeys(name for kind, name in self.trail if kind == "key"))

    @property
    def owner(self) -> str:
        """Path of the class around it, or that could not be used."""
        if self.trail[-1][0] == "class":
            return self.trail[-1][1]
        given = _WHERE.search(self.value)
        return given["cls"] if given else self.value


def explain(message: str, parser: argparse.ArgumentParser) -> str:
    """One line for `message` of a jsonargparse parser, whose arguments give the valid keys."""
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    problems = _problems(message)
    problem = max(problems, key=lambda one: len(one.trail))  # the first of those furthest in
    if problem.trail:
        text = _in_a_setting(problem, problems, parser)
    elif message.startswith("unrecognized arguments: "):
        text = _unknown_flags(message.split()[2:], parser)
    elif "required: " in message:
        text = _required(message.partition("required: ")[2].split(", "), parser)
    else:
        text = unknown_key(_quoted(message), parser) if " accept" in message else message
    return " ".join(text.split())


def refused(message: str) -> str:
    """One line for what a class said that could not be made, where a text lists all types the value might have had.

    Empty where it lists nothing that a class said.
    """
    tried, _, given = message.partition("\nGiven value type: ")
    sentences = tried.partition("\nErrors:")[2].split("\n  - ")[1:]
    said = next((text for text in sentences if not text.startswith(("Expected a", "Not a valid subclass"))), "")
    named = {match["cls"] for match in _WHERE.finditer(said)} or {match["cls"] for match in _WHERE.finditer(given)}
    name = named.pop().rpartition(".")[2] if len(named) == 1 else ""
    text = " ".join(_WHERE.sub("", said.replace("Problem with given ", "")).split()).lstrip(": ")
    return text if name in text else f"{name}: {text}"


def unknown_class(name: str, bases: Sequence[type]) -> str:
    """Why none of `bases` has a subclass called `name`, and which is nearest."""
    if takes_method(bases) and name.lower() in other_tools.METHODS:
        return f'no method "{name}": it is {other_tools.METHODS[name.lower()]}.'
    if takes_method(bases):
        return plugins.registry().explain_unknown(name)
    if noun(bases) == "data module" and name.lower() in other_tools.DATA:
        return f'no data module "{name}": here it is {other_tools.DATA[name.lower()]}.'
    unusable = plugins.registry().explain_unusable(name)  # its plugin has it, and fails
    return unusable or f'no {noun(bases)} "{name}".{_advice(name, bases)}'.rstrip()


def _problems(message: str) -> list[Problem]:
    """Every line of `message` that says what is wrong, with what the lines around it say of where."""
    found: list[Problem] = []
    trail: list[tuple[int, str, str]] = []
    lines = [line for line in message.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        text = line.lstrip(" -").rstrip()
        if text.startswith(_FRAME):
            continue
        indent = len(line) - len(line.lstrip(" "))
        trail = [part for part in trail if part[0] < indent]
        for match in _WHERE.finditer(text):
            trail.append((indent, "key", match["key"]) if match["key"] else (indent, "class", match["cls"]))
        said = _WHERE.sub("", text.partition(". Got value: ")[0]).rpartition("callable class: ")[2].strip()
        if said and not said.endswith(":"):
            found.append(Problem(said, _value(lines[number:]), tuple(part[1:] for part in trail)))
    return found or [Problem(message, "", ())]


def _value(lines: Iterable[str]) -> str:
    """The value that a line, or the first after it to do so, says was given."""
    for line in lines:
        for mark in ("Given value: ", "Got value: "):
            if mark in line:
                return line.partition(mark)[2].partition(". Got value: ")[0]
    return ""


def _quoted(text: str) -> str:
    """The key that `text` has in quotes, in parts where it names a group; a verb is no part of it."""
    words = text.split("'")[1::2]
    return ".".join(words[1:] if text.startswith("Subcommand") else words)


def _in_a_setting(problem: Problem, problems: Sequence[Problem], parser: argparse.ArgumentParser) -> str:
    text, key, name = problem.text, problem.key, problem.owner.rpartition(".")[2]
    bases, owner = bases_of(hint_of(problem.trail, parser)), imported_class(problem.owner)
    unknown = " accept" in text  # a field
    if text.startswith("Expected a dot import path string: "):
        return f"{key}: {unknown_class(text.rpartition(': ')[2], bases)}"
    if text.startswith(("Expected an instantiatable", "Not a valid subclass")) or (unknown and owner in bases):
        means = f"Write {key}: NAME or {key}: {{class_path: NAME, init_args: {{...}}}}, before any setting of it."
        return f"{key}: no {noun(bases)} is named. {means} {_choices(bases)}"
    if unknown:
        fields, word = [] if owner is None else parameters_of(owner), _quoted(text)
        if reason := getattr(owner, "fixed", {}).get(word):
            return f"{key}: {name} has no {word}: {reason}"
        takes = f" It takes: {', '.join(fields)}." if fields else ""
        return f'{key}: {name} has no "{word}".{_meant(word, fields, key) or did_you_mean(word, fields)}{takes}'
    if text.startswith("Expected a "):
        return _wrong_value(problem, [other.text for other in problems if other.trail == problem.trail])
    if text.startswith(("No module named", "module '")):
        missing = _quoted(text).split(".")  # or what the module itself imports is missing
        near = _advice(name, bases) if problem.owner.split(".")[: len(missing)] == missing or "attr" in text else ""
        return f"{key}: cannot import {problem.owner}: {text}.{near}"
    if text.startswith("it must be a mapping"):
        return f"{key}: {text.rstrip('.')}.{_inside(key, problem.value or _quoted_last(text), parser)}"
    named = f"{name}: " if owner is not None and name not in text else ""
    return f"{key}: {named}{text.rstrip('.')}. {_choices(bases) if 'subclass of' in text else ''}"


def _wrong_value(problem: Problem, sentences: Iterable[str]) -> str:
    choices: list[str] = []
    kinds: list[str] = []
    for sentence in sentences:
        kind = sentence.removeprefix("Expected a ")
        if "Literal[" in kind:
            choices += kind.split("'")[1::2]
        elif kind != sentence and not kind.startswith("dot import"):
            name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
            kinds.append(_TYPES.get(name, name))
    rule = " or ".join(dict.fromkeys([*(f'"{choice}"' for choice in choices), *kinds]))
    read = next((what for start, what in _READ.items() if problem.value.startswith(start)), "a number")
    textual = "text" in kinds and set(kinds) <= {"text", "null"} and not choices
    quotes = f" YAML reads it as {read}; put the text in quotes." if textual else ""
    return f'{problem.key} is "{problem.value}"; it must be {rule}.{quotes}{_meant_value(problem.value, choices)}'


def _meant_value(value: str, choices: Sequence[str]) -> str:
    meant = other_tools.VALUES.get(value)
    return f' Here it is "{meant}".' if meant in choices else did_you_mean(value, choices)


def _quoted_last(text: str) -> str:
    return text.split('"')[-2] if text.count('"') > 1 else ""


def _inside(key: str, value: str, parser: argparse.ArgumentParser) -> str:
    """Settings in the section `key`, and the one among them that takes `value` or what it stands for."""
    actions = {a.dest: a for a in parser._actions if a.dest.startswith(f"{key}.") and not a.dest.endswith("help")}
    for dest, action in actions.items():
        choices = get_args(getattr(action, "_typehint", None))
        for choice in (value, other_tools.VALUES.get(value)):
            if choice is not None and choice in choices:
                return f" Did you mean {dest} {choice}?"
    return f" It takes: {', '.join(dest.rpartition('.')[2] for dest in actions)}." if actions else ""


def _unknown_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    flags = [word.partition("=")[0].lstrip("-") for word in words if word.startswith("--")]
    if flags:
        return " ".join(unknown_key(flag, parser) for flag in flags)
    if words[0] in configs.config_names() or words[0].endswith((".yaml", ".yml", ".json")):
        return f'"{words[0]}" is a config; give it as --config {words[0]}.'
    return f'"{words[0]}" is no setting; settings are given as --key value, values with blanks in quotes.'


def unknown_key(key: str, parser: argparse.ArgumentParser) -> str:
    """That there is no setting `key`, which is nearest, and what there is beside it."""
    known = [
        action.dest for action in parser._actions if not action.dest.endswith(("help", "print_config", "print_shtab"))
    ]
    known = [dest for dest in known if dest != argparse.SUPPRESS] + ["run", "resume"]
    group = key[: key.rfind(".") + 1]
    group = group if any(dest.startswith(group) for dest in known) else ""
    beside = dict.fromkeys(dest.removeprefix(group).partition(".")[0] for dest in known if dest.startswith(group))
    takes = f"{group[:-1]} takes" if group else "Top level"
    listed = f" {takes}: {', '.join(beside if group else sorted(beside))}." if len(beside) <= 24 else ""
    meant = _meant(key.rpartition(".")[2], [], "") if not group or group in ("model.", "trainer.", "data.") else ""
    return f'no setting "{key}".{meant or did_you_mean(key, known)}{listed}'


def _meant(word: str, fields: Sequence[str], key: str) -> str:
    """The setting that is called `word` elsewhere; it may be one of `fields` of the class at `key`."""
    place = other_tools.SETTINGS.get(word, "")
    own = place.rpartition(".")[2]
    return f" Here it is {f'{key}.{own}' if own in fields else place}." if place else ""


def _required(keys: Sequence[str], parser: argparse.ArgumentParser) -> str:
    verb = keys[0].partition(".")[0]
    if verb in TRAINING_VERBS:
        keys = [key.removeprefix(f"{verb}.") for key in keys]
    if len(keys) > 1:
        names = configs.config_names()
        known = f"; there are: {', '.join(names)}" if names else ""
        return f"{', '.join(keys)} are required: give them in a config (--config NAME{known}), or as flags."
    bases = bases_of(hint_of([("key", keys[0])], parser))
    return f"{keys[0]} is required: give it in a config (--config NAME), or as --{keys[0]}. {_choices(bases)}"


def _advice(word: str, bases: Sequence[type]) -> str:
    """The nearest name, and all names where there is none or they are few."""
    names = short_names(bases)
    close = did_you_mean(word, names)
    return close if close and len(names) > 12 else f"{close} {_choices(bases)}"


def _choices(bases: Sequence[type]) -> str:
    names = short_names(bases)
    return f"Installed: {', '.join(names)}." if 0 < len(names) <= 100 else ""
