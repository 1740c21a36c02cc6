"""Arms of a comparison: names, and the settings in which they differ."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.cli.configs import find_config
from lora_lightning.errors import SettingsError, did_you_mean

REFERENCES = {
    "linear": {"model.targets": "none", "model.also_train": "heads"},
    "full": {"model.targets": "none", "model.also_train": "all"},
}
"""Arms without an adapter: the head alone on frozen features, and full fine-tuning."""


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by dotted flag of `fit`."""
    configs: tuple[str, ...] = ()
    """Configs that come on top of the comparison's own."""
    against: str = ""
    """The arm that it is compared with; empty for the first one."""

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^\w.=-]+", "_", self.name).strip("_.") or "arm"

    def words(self) -> list[str]:
        """The flags of `fit`."""
        return [*(word for name in self.configs for word in ("--config", name)), *flags(self.settings)]


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of `fit`."""
    return [word for key, value in settings.items() for word in (f"--{key}", _spelled(value))]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def around(wrappers: Iterable[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of methods that stand around another one, by name: inside is the method that all arms are given.

    Args:
        wrappers: names of such methods.
        given: settings of all arms by dotted key.
    """
    inside = {
        f"model.method.inner{key.removeprefix('model.method')}": value
        for key, value in given.items()
        if key == "model.method" or key.startswith("model.method.")
    }
    own = given.get("model.method")
    return {name: {"model.method": name, **inside} for name in wrappers if isinstance(own, str) and own != name}


def from_flags(
    methods: Sequence[str],
    vary: Sequence[str],
    listed: bool,
    known: Iterable[str],
    wrapped: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Arm]:
    """Arms of `--methods` and `--vary`: every combination, or with `listed` the first values of all, the second, ...

    Args:
        methods: names of methods, "linear" or "full".
        vary: SETTING=VALUE,VALUE,... each.
        listed: whether values are taken side by side.
        known: names of all methods.
        wrapped: settings of methods that stand around another one, see `around`.

    Raises:
        SettingsError: an unknown method, a --vary that cannot be read, or lists of several lengths.
    """
    several = [*([("method", list(methods))] if methods else []), *map(_varied, vary)]
    known = [*known, *REFERENCES]
    for key, values in several:
        for value in values if key in ("method", "model.method") else ():
            if isinstance(value, str) and value not in known:
                raise SettingsError(f'--methods: there is no method "{value}".{did_you_mean(value, known)}')
    lengths = {key: len(values) for key, values in several}
    if listed and len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise SettingsError(f"--listed takes values side by side, so each needs as many: {told}.")
    columns = [values for _, values in several]
    rows = zip(*columns, strict=True) if listed else itertools.product(*columns)
    named = {**REFERENCES, **(wrapped or {})}
    return [_arm(dict(zip(lengths, row, strict=True)), named) for row in rows] if several else []


def _varied(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    try:
        read = yaml.safe_load(f"[{values}]") if equals else []
    except yaml.YAMLError:
        read = []
    if not read:
        raise SettingsError(
            f'--vary is "{text}"; write a setting and its values, such as --vary model.method.rank=4,16,64.'
        )
    return key.removeprefix("--"), read


def _arm(row: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> Arm:
    """One row of settings, with the method first, which other settings may be fields of."""
    settings: dict[str, Any] = {}
    names = []
    for key, value in sorted(row.items(), key=lambda item: item[0] not in ("method", "model.method")):
        if key in ("method", "model.method"):
            settings |= named.get(value, {"model.method": value})
            names.append(str(value))
        else:
            settings[key] = value
            names.append(f"{key.rpartition('.')[2]}={value}")
    return Arm(" ".join(names), settings)


KEYS = ("arms", "config", "settings", "options")
"""What a file of arms has."""


@dataclass(frozen=True)
class ArmsFile:
    """What a file of arms says."""

    words: list[str]
    """Flags of `fit` for all arms."""
    arms: list[Arm]
    options: dict[str, Any]
    """Options of `compare` by name, such as `{"budget": "same"}`."""


def from_file(path: Path, known: Iterable[str]) -> ArmsFile:
    """The arms of a YAML file.

    It has `arms`: a mapping from names to settings (dotted or nested; `config` names one on top, and `against` the arm
    that it is compared with), a list of names of methods, or the name of a file whose arms it takes. It may have
    `config`, one or several for all, `settings` for all, and `options` of `compare`.

    Raises:
        SettingsError: no arms, or a part that is unknown or of another kind.
    """
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: it cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(read, dict) or not read.get("arms"):
        raise SettingsError(f"{path}: it has no `arms`, a mapping from names to the settings in which they differ.")
    for key in read:
        if key not in KEYS:
            raise SettingsError(f'{path}: it takes no "{key}".{did_you_mean(key, KEYS)}')
    for key in ("settings", "options"):
        if not isinstance(read.get(key) or {}, dict):
            raise SettingsError(f"{path}: `{key}` is {read[key]!r}; it must be a mapping.")
    words = [word for name in _listed(read.get("config")) for word in ("--config", name)]
    words += flags(dotted(read.get("settings") or {}))
    return ArmsFile(words, _arms_in(path, read["arms"], known), dict(read.get("options") or {}))


def _arms_in(path: Path, arms: Any, known: Iterable[str]) -> list[Arm]:
    if isinstance(arms, str):
        return from_file(Path(find_config(arms)), known).arms
    if isinstance(arms, list):
        return from_flags(list(map(str, arms)), (), False, known)
    if not isinstance(arms, dict):
        raise SettingsError(f"{path}: `arms` is {arms!r}; it must be a mapping, a list of methods, or a file.")
    found = []
    for name, settings in arms.items():
        if settings is not None and not isinstance(settings, dict):
            raise SettingsError(f"{path}: arms.{name} is {settings!r}; it must be a mapping of settings.")
        own = dotted(settings or {})
        configs, against = tuple(_listed(own.pop("config", None))), str(own.pop("against", ""))
        found.append(Arm(str(name), REFERENCES.get(str(name), {}) | own, configs, against))
    return found


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(map(str, value))


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; what has a class path stays one value, and so do lists."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and "class_path" not in value and "." not in str(key):
            found |= dotted(value, f"{name}.")
        else:
            found[name] = value
    return found


def check(arms: Sequence[Arm]) -> None:
    """Raise `SettingsError` for too few arms, several of one name, or one to compare with that there is not."""
    if len(arms) < 2:
        raise SettingsError("compare: there are no two arms; name them with --methods, --vary or a file of arms.")
    slugs: dict[str, str] = {}
    for arm in arms:
        if (other := slugs.setdefault(arm.slug, arm.name)) != arm.name or len({a.name for a in arms}) < len(arms):
            same = other if other != arm.name else "another one"
            raise SettingsError(
                f'compare: the arm "{arm.name}" and {same} would share a folder; give them other names.'
            )
    names = [arm.name for arm in arms]
    for arm in arms:
        if arm.against and (arm.against not in names or arm.against == arm.name):
            raise SettingsError(
                f'compare: arms.{arm.name}.against is "{arm.against}"; it must be another arm.'
                f"{did_you_mean(arm.against, [name for name in names if name != arm.name])}"
            )
    first = next((arm for arm in arms if arm.against), None)
    if first is arms[0]:
        raise SettingsError(
            f'compare: arms.{first.name}.against is "{first.against}"; the first arm is what others are compared '
            "with. Put that arm first."
        )
