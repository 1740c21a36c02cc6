"""Compiling the repeated blocks of a model in place, for the time of a fit.

Each block is compiled by itself, so that names of modules and tensors stay, and so that what stands between blocks
(checkpointing, sharding, gates' hooks on the model) goes on as always. Blocks of one kind share what is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

from torch import nn

from lora_lightning.errors import SettingsError
from lora_lightning.models.scopes import pretrained_models
from lora_lightning.training.strategies.units import find_blocks

BACKEND = "inductor"
"""Of torch.compile; on the CPU it needs a C++ compiler."""


def check_compile(asked: Literal["off", "blocks", False] | None, gradient_checkpointing: bool) -> str:
    """What is compiled: "blocks" or "off", which YAML reads as False.

    Raises:
        SettingsError: blocks that are compiled and recomputed.
    """
    if asked == "blocks" and gradient_checkpointing:
        raise SettingsError(
            'model.compile is "blocks" and model.gradient_checkpointing is true; torch cannot compile a '
            "recomputation that keeps what adapters know of a forward. Set one of them to off (false)."
        )
    return asked or "off"


@contextmanager
def compiled(model: nn.Module, backend: str | None = None) -> Iterator[list[str]]:
    """Inside, each repeated block of a model is compiled when it is first called; afterwards it computes as before.

    Inside, forwards keep no keys and values of attention either: these know the number of their block, so that each
    block would be compiled by itself.

    Args:
        model: with its adapters.
        backend: of torch.compile; None for `BACKEND`.

    Yields:
        Paths of the blocks.

    Raises:
        SettingsError: an adapter reads values of earlier layers, which lie outside of its block.
    """
    for path, module in model.named_modules():
        if getattr(module, "reads_context", False):
            raise SettingsError(
                f'model.compile is "blocks", and {path} leaves or reads values that cross blocks, which torch cannot '
                "trace. Set model.compile to off (false)."
            )
    found = find_blocks(model)
    parts = pretrained_models(dict(model.named_modules())).values()
    configs = [cast(Any, part).config.get_text_config() for part in parts]
    caching = [config for config in configs if getattr(config, "use_cache", None)]
    for config in caching:
        config.use_cache = False
    for block in found.values():
        block.compile(backend=backend or BACKEND)
    try:
        yield list(found)
    finally:
        for block in found.values():
            block._compiled_call_impl = None
        for config in caching:
            config.use_cache = True
