"""Where modules stand in a model, and what they are called without wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, name) under which a module stands, by the module's id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
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
