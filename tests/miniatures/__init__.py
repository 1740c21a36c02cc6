"""Published methods in miniature: the first users of rooms that no bundled plugin needs yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_lightning.methods import Method
from lora_lightning.plugins import registry


@contextmanager
def installed(*methods: type[Method]) -> Iterator[None]:
    """Methods known by name inside the block, as if a plugin had brought them."""
    known = registry().methods
    known.update({method.__name__: method for method in methods})
    try:
        yield
    finally:
        for method in methods:
            del known[method.__name__]
