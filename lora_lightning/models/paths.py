"""Names along a module path, places where modules stand, and what they are called without wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lora_lightning.errors import TargetError

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


def segments(path: str) -> list[str]:
    """Names along a module path."""
    return path.split(".")


def join(*parts: str) -> str:
    """Parts of a path, empty ones left out."""
    return ".".join(part for part in parts if part)


def inside(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or lies below it; everything lies below ""."""
    return not prefix or path == prefix or path.startswith(f"{prefix}.")


def within(pattern: str, path: str) -> bool:
    """Whether `pattern` is a run of whole names inside `path`, or a regular expression for all of it."""
    return f".{pattern}." in f".{path}." or full_match(pattern, path, "pattern")


def full_match(pattern: str, path: str, where: str) -> bool:
    """Whether the expression `pattern` fits all of `path`; raises `TargetError` naming `where` where it is none."""
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise TargetError(
            f'{where}: "{pattern}" is neither a part of a name nor a regular expression: {error}.'
        ) from error


def places(modules: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, name) under which a child of `modules` stands, by the child's id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in modules:
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found


def plain(path: str) -> str:
    """A module path or tensor name without the wrappers that torch.compile, FSDP1 or checkpointing put into it."""
    return _WRAPPERS.sub("", path).rstrip(".")


def starting_with(prefixes: Iterable[str], keys: Iterable[str]) -> set[str]:
    """Keys under one of `prefixes`, each of which ends with a dot; in time linear in both."""
    wanted = set(prefixes)
    return {key for key in keys if any(key[: match.end()] in wanted for match in re.finditer(r"\.", key))}


def unwrap(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps, or the module itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner
