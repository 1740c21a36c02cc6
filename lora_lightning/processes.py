"""Several processes that must agree: on an object, and on whether all of them succeeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lora_lightning.errors import ProcessError


def gather_objects(mine: Any) -> list[Any]:
    """One object of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


@contextmanager
def together() -> Iterator[None]:
    """An error on one process becomes one on all, so that none is left waiting; nothing inside may wait for others.

    Raises:
        ProcessError: it was another process that failed.
    """
    try:
        yield
    except Exception as error:
        if dist.is_initialized():
            gather_objects(f"{type(error).__name__}: {error}")
        raise
    for rank, failure in enumerate(gather_objects(None)):
        if failure is not None:
            raise ProcessError(f"process {rank} failed: {failure}")
