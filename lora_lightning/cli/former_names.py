"""Names that settings and classes had in earlier versions: configs and flags that hold them are read as today's.

A class states the former names of its settings in `former_fields`, or they stand in `FIELDS`. The parser reads all YAML
through `load`, so that a config stays the file that it is, for its messages and for paths beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lora_lightning import plugins
from lora_lightning.cli.auto_rate import is_auto, marked
from lora_lightning.cli.classes import imported_class, named_classes
from lora_lightning.cli.given_settings import config_text, given_settings, setting_of
from lora_lightning.cli.text_settings import texts_in
from lora_lightning.methods import renamed
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.registry import TRAINING_VERBS, arguments
from lora_lightning.training.module import AdapterModule

FIELDS: dict[str, dict[str, str]] = {
    "AdapterModule": {"quantisation": "quantization"},
    "TableData": {"validation_share": "validation_fraction"},
    "MaskedText": {"mask_share": "mask_fraction"},
}
"""Today's name by the former one, for a class of core and those below it."""
PLACES: dict[str, type[Any]] = {"model": AdapterModule, "model.lr_scheduler": WarmUp}
"""Classes that no config names."""
MODE = "lora_lightning"
"""What jsonargparse knows `load` as."""

ADVICE = '; a text that holds ": " or " #", or begins with one of [ ] { } @ % & * ! | > - or a quote, needs quotes'
"""What is said where YAML cannot be read."""

_files: ContextVar[Mapping[str, str]] = ContextVar("files", default={})  # noqa: B039 - never changed
_texts: ContextVar[frozenset[str]] = ContextVar("texts", default=frozenset())
_places: ContextVar[Mapping[str, type[Any]] | None] = ContextVar("places", default=None)


@contextmanager
def understood(words: Sequence[str]) -> Iterator[list[str]]:
    """Gives `words` with the flags of today; inside, `load` knows which class they and their configs name for what.

    A config that changes one field of a class need not name the class, if another one does.
    """
    if _places.get() is not None:  # the parser of a class, which is told by the outermost
        yield list(words)
        return
    places = PLACES | _classes_in(words)
    now = marked([_current_flag(word, places) for word in words])
    place, text, file = _places.set(places), _texts.set(texts_in(now, places)), _files.set(_configs_in(now))
    try:
        yield now
    finally:
        _places.reset(place)
        _texts.reset(text)
        _files.reset(file)


OF_A_FIT = ("ckpt_path", "weights_only")
"""Settings of training verbs that a run's config.yaml has with null, and other verbs do not know."""


def load(text: str) -> Any:
    """What YAML holds, under today's names; a flag's value for a setting that is text is that text.

    Raises:
        YAMLError: no YAML, or a key that stands twice, of which YAML would take the last.
    """
    if text in _texts.get():
        return text
    try:
        check_keys(text)
        found = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        quotes = ADVICE if isinstance(error, yaml.MarkedYAMLError) else ""
        place = _files.get().get(text, "the text given")
        raise yaml.YAMLError(f"{' '.join(str(error).split())}{quotes}".replace('"<unicode string>"', place)) from error
    return current(found, _places.get() or PLACES)


def _configs_in(words: Sequence[str]) -> dict[str, str]:
    """Names of config files by what they hold."""
    named = [
        word.partition("=")[2] or following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == "--config"
    ]
    return {config_text(name): name for name in named}


def check_keys(text: str) -> None:
    """Raise `YAMLError` where a mapping has a key twice."""
    root = yaml.compose(text, Loader=yaml.SafeLoader) if ":" in text or "?" in text else None
    waiting = [(root, "")]
    while waiting:
        node, path = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            waiting += [(value, path) for value in node.value]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag.endswith(":null"):
                raise yaml.YAMLError(
                    f"a key in line {key.start_mark.line + 1} has no name; a text that has ? or : in quotes"
                )
            name, line = str(key.value), key.start_mark.line + 1
            inside = f"{path}.{name}".lstrip(".")
            if name in lines and name != "<<":
                raise yaml.YAMLError(
                    f'the key "{inside}" stands twice, in lines {lines[name]} and {line}, and YAML would take the last '
                    "only; put both together"
                )
            lines[name] = line
            waiting.append((value, inside))


def current(node: Any, places: Mapping[str, type[Any]], place: str = "") -> Any:
    """`node` of a config under today's names.

    Args:
        node: settings.
        places: classes by the dotted place that their settings have in a whole config.
        place: where `node` stands.
    """
    if isinstance(node, list):
        return [current(one, {}) for one in node]  # each names its class
    if not isinstance(node, dict):
        return node
    path, owner = node.get("class_path"), places.get(place)
    if isinstance(path, str):
        path = plugins.registry().current_class_path(path)
        node, owner = {**node, "class_path": path}, _class(path)
    if owner is not None:
        node = renamed(node, former_fields(owner))
        if isinstance(node.get("init_args"), dict):
            node = {**node, "init_args": renamed(node["init_args"], former_fields(owner))}
    found: dict[str, Any] = {}
    for name, value in node.items():
        if not place and value is None and name in OF_A_FIT:
            continue
        if is_auto(name, value, place):
            value = math.nan
        inside = name == "init_args" or (not place and name in TRAINING_VERBS)
        found[name] = current(value, places, place if inside else f"{place}.{name}".lstrip("."))
    return found


def former_fields(owner: type[Any]) -> dict[str, str]:
    """Today's name of a class's settings by their former ones; a name that the class still takes is none."""
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        found |= FIELDS.get(base.__name__, {}) | vars(base).get("former_fields", {})
    return {old: new for old, new in found.items() if old not in arguments(owner)}


def _classes_in(words: Sequence[str]) -> dict[str, type[Any]]:
    found: dict[str, type[Any]] = {}
    for place, given in given_settings(words, get_loader("yaml")).items():
        last = given[-1] if isinstance(given, list) and given else given  # flags go to the last of a list
        path = last.get("class_path") if isinstance(last, dict) else last
        owner = _class(plugins.registry().current_class_path(path)) if isinstance(path, str) else None
        if owner is not None:
            found[place] = owner
    return found


def _class(path: str) -> type[Any] | None:
    """The class that a full path or a short name means, where it is imported."""
    if "." in path:
        return imported_class(path)
    if path in plugins.registry().methods:
        return plugins.registry().methods[path]
    for base in (Callback, LightningDataModule, Optimizer):
        if path in (known := named_classes(base)):
            return known[path]
    return None


def _current_flag(word: str, places: Mapping[str, type[Any]]) -> str:
    flag, equals, value = word.partition("=")
    place, _, name = setting_of(flag).rpartition(".")
    if not word.startswith("--") or place not in places:
        return word
    new = former_fields(places[place]).get(name)
    return word if new is None else f"{flag.rpartition('.')[0]}.{new}{equals}{value}"


set_loader(MODE, load, exceptions=(yaml.YAMLError,))
