"""A config of another tool on its way into ours: what has been read, what it became, and what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lora_lightning.cli.other_tools import ABSENT, SETTINGS, UNNEEDED
from lora_lightning.errors import SettingsError
from lora_lightning.plugins import registry

CLASSES = ("model.method", "model.optimizer", "model.optimizer.inner", "data")
"""Places that hold a class with its settings."""


class Translation:
    """Settings of another tool beside those that stand for them here.

    Args:
        tool: its name.
        given: its settings.

    Attributes:
        config: our values by dotted place; the name of a class stands at the place of its settings.
        lost: what could not be carried over, and what to do instead, by the other tool's name.
        unneeded: what needs nothing here, and why, by its name.
        notes: what the reader should know of what was carried over.
    """

    def __init__(self, tool: str, given: Mapping[str, Any]) -> None:
        self.tool, self.given = tool, dict(given)
        self.config: dict[str, Any] = {}
        self.lost: dict[str, str] = {}
        self.unneeded: dict[str, str] = {}
        self.notes: list[str] = []
        self._read: set[str] = set()

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of some settings that is given and not null; all of them count as read."""
        self._read |= set(names)
        found = next((self.given[name] for name in names if self.given.get(name) is not None), None)
        return default if found is None else found

    def number(self, *names: str, default: Any = None) -> Any:
        """The same for a number; YAML reads 1e-4 as text.

        Raises:
            SettingsError: it is none.
        """
        value = self.get(*names, default=default)
        if not isinstance(value, str):
            return value
        try:
            number = float(value)
        except ValueError as error:
            raise SettingsError(f'{self.name_of(*names)} is "{value}"; it must be a number.') from error
        return int(number) if number.is_integer() and "e-" not in value and "." not in value else number

    def name_of(self, *names: str) -> str:
        """The first of some settings that is given."""
        return next((name for name in names if self.given.get(name) is not None), names[0])

    def put(self, place: str, value: Any) -> None:
        """Set one of ours."""
        self.config[place] = value

    def lose(self, name: str, why: str) -> None:
        """Say that a setting is not carried over."""
        self._read.add(name)
        self.lost[name] = why

    def finish(self) -> None:
        """Carry over what nobody has read: by the table of words, or into the list of what is lost."""
        for name, value in self.given.items():
            if name in self._read or value is None:
                continue
            place = SETTINGS.get(name, "")
            if name in UNNEEDED:
                self.unneeded[name] = UNNEEDED[name]
            elif name in ABSENT:
                if value is not False:
                    self.lost[name] = ABSENT[name]
            elif place and " " not in place:
                self.put(place, value)
            elif value is not False or place:
                self.lost[name] = f"here it is {place}" if place else "nothing here stands for it"
            else:
                self.unneeded[name] = "it is off"

    def nested(self) -> dict[str, Any]:
        """Our config as YAML has it."""
        tree: dict[str, Any] = {}
        for place in sorted(self.config, key=lambda key: key.count(".")):
            node = tree
            *parents, last = place.split(".")
            path = ""
            for parent in parents:
                path = f"{path}.{parent}".lstrip(".")
                node = node.setdefault(parent, {})
                if path in CLASSES:
                    node = node.setdefault("init_args", {})
            value = self.config[place]
            node[last] = {"class_path": value} if place in CLASSES else value
        order = ("seed_everything", "model", "data", "trainer")
        return {name: tree[name] for name in sorted(tree, key=lambda k: order.index(k) if k in order else len(order))}

    def text(self, source: str) -> str:
        """Our YAML, with all that was lost in comments behind it."""
        body = yaml.dump(self.nested(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=116)
        lines = [f"# From {source}, of {self.tool}. Look at it with: doctor --config FILE, inspect-data FILE", body]
        for title, told in (
            ("Not carried over:", [f"{name}: {self._value(name)}: {why}" for name, why in self.lost.items()]),
            ("Good to know:", self.notes),
            ("Needs nothing here:", [f"{name}: {why}" for name, why in self.unneeded.items()]),
        ):
            if told:
                lines += [f"# {title}", *(f"#   {text}" for text in told)]
        return "\n".join(lines) + "\n"

    def _value(self, name: str) -> str:
        shown = yaml.safe_dump(self.given.get(name), default_flow_style=True, width=10**9).split("\n")[0].strip()
        return shown if len(shown) <= 60 else f"{shown[:57]}..."


class _Dumper(yaml.SafeDumper):
    """Writes numbers so that YAML reads them as numbers: 1.0e-05, which it takes for text without the point."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = f"{value!r}"
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)


def method_of(options: Mapping[str, object]) -> str:
    """The installed method that peft's format means with some options, such as `use_dora`.

    Raises:
        SettingsError: none does, or several do.
    """
    known = registry().methods.items()
    found = [name for name, method in known if method.peft_type == "LORA" and dict(method.peft_options) == options]
    if len(found) != 1:
        what = f"peft's LoRA with {', '.join(options)}" if options else "peft's plain LoRA"
        raise SettingsError(f"{len(found)} installed methods are {what}; one is needed. Look at methods.")
    return found[0]
