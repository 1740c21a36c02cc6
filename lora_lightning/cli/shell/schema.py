"""A JSON schema of configs, plugins included, from which editors complete and check.

jsonargparse writes one from the parser. It is repaired in these points:

    trainer.callbacks   it cannot describe the classes behind that type: they are described here, `callbacks+` too
    class_path          short names are as good as full ones
    params, required    what training fills in is no setting, and a config may be one of several
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from lora_lightning import plugins
from lora_lightning.cli import command_line as argv
from lora_lightning.cli.cards import arguments_of, description_of
from lora_lightning.cli.classes import named_classes
from lora_lightning.cli.hints import hide_hints
from lora_lightning.cli.lightning import CLI
from lora_lightning.errors import PluginError

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
_LISTS = ("callbacks", "logger", "plugins")
"""Settings of the trainer that a later config may add to, with a plus behind the name."""


class _Settings(CLI):
    """The parser of all settings; nothing is parsed."""

    def __init__(self, line: argv.Line) -> None:
        super().__init__(line, run=False)

    def parse_arguments(self, parser: Any, args: Any) -> None:  # noqa: ARG002 - Lightning's signature
        """Nothing."""
        self.config = Namespace(seed_everything=False)  # type: ignore[no-untyped-call]

    def before_instantiate_classes(self) -> None:
        """Nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def config_schema(blocked: Sequence[str] = ()) -> dict[str, Any]:
    """The schema of what `--config` takes, with all plugins but those that are blocked."""
    hide_hints()
    parser = _Settings(argv.Line((), blocked=tuple(blocked))).parser
    parser._actions = [action for action in parser._actions if action.dest != "trainer.callbacks"]
    schema: dict[str, Any] = json.loads(parser.get_completion_script("jsonschema"))
    for node in list(_nodes(schema)):
        _repair(node)
    schema.pop("required", None)
    groups = schema["properties"]
    for group in ("model", "trainer", "data"):
        groups[group].pop("required", None)
    trainer = groups["trainer"]["properties"]
    callback = {"anyOf": [{"enum": _names(Callback)}, *map(_described, named_classes(Callback).values())]}
    trainer["callbacks"] = {"anyOf": [{"type": "null"}, callback, {"type": "array", "items": callback}]}
    trainer |= {f"{name}+": trainer[name] for name in _LISTS}
    groups["ckpt_path"] = {"type": ["string", "null"]}  # in the config.yaml of a run
    groups["weights_only"] = {"type": ["boolean", "null"]}
    return schema


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)


def _repair(node: dict[str, Any]) -> None:
    """Short names beside the full one; no parameters of a model among an optimizer's settings."""
    if isinstance(node.get("anyOf"), list):
        node["anyOf"] = [choice for choice in node["anyOf"] if not _is_blocked(choice)]
    properties = node.get("properties")
    if not isinstance(properties, dict):
        return
    path = properties.get("class_path", {}).get("const")
    if isinstance(path, str):
        properties["class_path"] = {"enum": [path.rpartition(".")[2], path]}
    if "params" in properties:
        del properties["params"]
        node["required"] = [name for name in node.get("required", ()) if name != "params"]
        if not node["required"]:
            del node["required"]


def _is_blocked(choice: Mapping[str, Any]) -> bool:
    """Whether a choice is a class of a blocked plugin, which another command in this process has imported."""
    path = choice.get("properties", {}).get("class_path", {}).get("const")
    try:
        plugins.registry().refuse_blocked(str(path), "")
    except PluginError:
        return True
    return False


def _names(base: type) -> list[str]:
    return [word for name, cls in named_classes(base).items() for word in (name, f"{cls.__module__}.{name}")]


def _described(cls: type) -> Mapping[str, Any]:
    """A class with its settings, as a config writes it."""
    cards = arguments_of(cls)
    settings = {card.name: {**_type(card.type), "description": card.text} for card in cards}
    required = [card.name for card in cards if card.default == "required"]
    return {
        "type": "object",
        "description": description_of(cls).partition("\n")[0],
        "additionalProperties": False,
        "properties": {
            "class_path": {"enum": [cls.__name__, f"{cls.__module__}.{cls.__name__}"]},
            "init_args": {
                "type": "object",
                "additionalProperties": False,
                "properties": settings,
                **({"required": required} if required else {}),
            },
        },
        "required": ["class_path", *(["init_args"] if required else [])],
    }


def _type(annotation: str) -> dict[str, Any]:
    """The types of a plain annotation; nothing where it is another."""
    parts = annotation.replace("typing.", "").split(" | ")
    if optional := annotation.startswith("Optional["):
        parts = [annotation[len("Optional[") : -1], "None"]
    known = [_TYPES[part] for part in parts if part in _TYPES]
    return {"type": known} if len(known) == len(parts) and (optional or parts) else {}
