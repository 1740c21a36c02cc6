"""Layers whose owner reads their weight instead of calling them: their adapters act through the merged weight.

    nn.MultiheadAttention    out_proj.weight
    Mamba's mixer            dt_proj.weight @ time_step

Found in the owner's source: it holds `self.NAME.weight @`, or it reads the weight (more than a question about dtype)
and `self.NAME(` is nowhere. What is handed to a fused kernel, and called elsewhere, is left out: both give the same.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_QUESTIONS = ("dtype", "device", "shape", "size", "ndim", "dim", "is_cuda")


def weight_read_layers(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, str]:
    """Those layers at `paths` whose weight their owner reads instead of calling them, with the owner's class name.

    Args:
        modules: every module of the model by path.
        paths: layers to look at.
    """
    found = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner: Any = type(modules[parent])  # a class is hashable, which mypy doubts of module classes
        if reads(owner, name):
            found[path] = owner.__name__
    return found


@functools.cache
def reads(owner: type[nn.Module], name: str) -> bool:
    """Whether modules of class `owner` read the weight of their layer `name` instead of calling it."""
    classes: list[Any] = [cls for cls in owner.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    if not any(_mentions(cls, name) for cls in classes):
        return False
    text = "".join(_source(cls) for cls in classes)
    own = rf"\bself\.{re.escape(name)}"
    if re.search(rf"{own}\.weight(\.(T|mT|t\(\)))? @", text):
        return True
    read = re.search(rf"{own}\.weight\b(?!\.({'|'.join(_QUESTIONS)})\b)", text)
    return read is not None and re.search(rf"{own}\(", text) is None


def _mentions(cls: type[nn.Module], name: str) -> bool:
    """Whether a function of the class names both the layer and a weight; far cheaper than its source."""
    functions = [inspect.unwrap(member) for member in vars(cls).values() if inspect.isfunction(member)]
    return any({name, "weight"} <= set(function.__code__.co_names) for function in functions)


@functools.cache
def _source(cls: type[nn.Module]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # typed into an interpreter, or generated
        return ""
