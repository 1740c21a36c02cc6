"""Names of tensors in a file of peft's LORA format, and the spellings that programs around peft leave in them.

    base_model.model.<path>.lora_A.weight                peft's own
    base_model.model.<path>.lora_A.default.weight        a state dictionary of a peft model, with the adapter's name
    module.base_model.model....                          taken inside DistributedDataParallel
    base_model.model._orig_mod.<path>....                taken inside torch.compile, FSDP1 or checkpointing
    <path>.lora_A.weight                                 without the wrapper of peft

All of them are read where only one reading is possible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.peft.rules import PREFIX
from lora_lightning.exporters.peft.triplets import WEIGHTS
from lora_lightning.models.paths import plain

MAGNITUDE = "lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_A": "A",
    ".lora_B": "B",
    f".{WEIGHTS}": WEIGHTS,
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".base_layer.weight": "base",
    ".base_layer.bias": "base_bias",
    f".{MAGNITUDE}": MAGNITUDE,
    ROWS: "rows",
}
_NAMED = (
    re.compile(r"(\.lora_[AB])\.([^.]+)(\.(?:weight|bias))$"),
    re.compile(r"(\.lora_embedding_[AB])\.([^.]+)()$"),
    re.compile(r"(\.lora_[ABE])\.(?!(?:weight|bias)$)([^.]+)()$"),
    re.compile(rf"(\.{MAGNITUDE})\.([^.]+)\.weight()$"),
    re.compile(rf"({re.escape(ROWS)})\.([^.]+)()$"),
    re.compile(r"()\.modules_to_save\.([^.]+)(\.[^.]+)$"),
)
_COPIES = {
    "copy": re.compile(r"\.modules_to_save(\.bias)$"),
    "original": re.compile(r"\.original_module(\.bias)$"),
}
"""With `bias="all"` peft writes biases of modules that are saved whole three times; it never computes the original."""
_OTHER = (".lora_", ".token_adapter.", ".base_layer.", ".modules_to_save.", ".original_module.")
_ADVICE = "Load the adapter in peft and save it with save_pretrained, which writes the names that are read here."


@dataclass(frozen=True)
class Name:
    """What a tensor of the file is."""

    key: str
    """Its name in the file."""
    path: str
    """Path of the layer in the plain model; of a head, the parameter's name."""
    role: str
    """"A", "B", "bias", "base", "base_bias", "lora_magnitude_vector", "lora_E", "rows", "head", or its "copy" or
    "original"."""


def understand(keys: Iterable[str], where: str, in_model: Callable[[str], str] = str) -> list[Name]:
    """What each tensor is.

    Args:
        keys: names of all tensors of the file.
        where: the folder, for messages.
        in_model: takes what peft puts around modules out of a name.

    Raises:
        AdapterFileError: names that two adapters or two parts of a model could have, or that the format does not have.
    """
    spelled = {key: _plain(key) for key in keys}
    bare = [key for key, name in spelled.items() if not name.startswith(PREFIX)]
    if bare and len(bare) < len(spelled):
        raise AdapterFileError(
            f'{where}: tensor {bare[0]} does not start with "{PREFIX}", while others do, so what it belongs to is not '
            f"clear. {_ADVICE}"
        )
    found: dict[tuple[str, str], Name] = {}
    adapters: dict[str, str] = {}
    for key, name in spelled.items():
        short, adapter = _without_adapter(name.removeprefix(PREFIX))
        adapters.setdefault(adapter, key)
        one = _name(key, in_model(short), where)
        other = found.setdefault((one.path, one.role), one)
        if other is not one:
            raise AdapterFileError(f"{where}: {other.key} and {key} name the same tensor of {one.path}. {_ADVICE}")
    named = [adapter for adapter in adapters if adapter]
    if len(named) > 1:
        raise AdapterFileError(
            f"{where} holds the adapters {', '.join(named)} in one file ({adapters[named[0]]}, {adapters[named[1]]}). "
            f"{_ADVICE}"
        )
    return list(found.values())


def _plain(key: str) -> str:
    """A name without what DistributedDataParallel, torch.compile, FSDP1 and checkpointing put into it."""
    name = plain(key)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _without_adapter(name: str) -> tuple[str, str]:
    """A name as peft saves it, and the adapter's name that stood in it, or ""."""
    for pattern in _NAMED:
        match = pattern.search(name)
        if match:
            return name[: match.start()] + match[1] + match[3], match[2]
    return name, ""


def _name(key: str, short: str, where: str) -> Name:
    for ending, role in _ROLES.items():
        if short.endswith(ending):
            return Name(key, short.removesuffix(ending), role)
    for role, pattern in _COPIES.items():
        if pattern.search(short):
            return Name(key, pattern.sub(r"\1", short), role)
    if any(part in f".{short}" for part in _OTHER):
        raise AdapterFileError(f"{where}: tensor {short} belongs to a variant that is not read here. {_ADVICE}")
    return Name(key, short, "head")
