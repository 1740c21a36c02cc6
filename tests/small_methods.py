"""Every installed method with settings small enough for toy models: a new one joins the tests by being installed.

A value is chosen by the name of the field that takes it; a method keeps its defaults for everything else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_lightning.methods import Method
from lora_lightning.plugins import registry

SMALL: dict[str, Any] = {
    "rank": 2,
    "sparsity": 0.5,
    "start": 2,
    "end": 3,
    "experts": 3,
    "top_k": 2,
    "router_lr_ratio": 1.0,  # at its default, float32 routers of toy models stay as they are
    "svd_rank": 1,
    "every_n_steps": 1,
    "stage_steps": 2,
    "threshold": 0.03,  # toy weights are few
    "active_layers": None,  # toy models have fewer than the default
    "gains": {},  # of blocks, in place of data to learn them from
}
WRAPPED = "LoRA"
"""The method inside one that wraps another."""


def small(name: str, **changed: Any) -> Method:
    """The method `name` with small values for the fields that it has."""
    method = registry().method(name)
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        if str(field.type) == Method.__name__:
            settings[field.name] = small(WRAPPED)
        elif not isinstance(field.default, str):  # `start` is a number of steps here, a kind of start there
            settings |= {name: value for name, value in (SMALL | changed).items() if name == field.name}
    return method(**settings)


def small_methods(**changed: Any) -> dict[str, Method]:
    """All of them by name."""
    return {name: small(name, **changed) for name in sorted(registry().methods)}


def wraps(method: Method) -> bool:
    """Whether it is a schedule around another method."""
    return any(isinstance(getattr(method, field.name), Method) for field in dataclasses.fields(method))
