"""Random draws as functions of (seed, purpose, stage, path): the same on every process, with no state to save."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, stage: int, path: str) -> torch.Generator:
    """A CPU generator for one draw, which has to name the generator's device: the default one may be another.

    Args:
        seed: seed of the run.
        purpose: what is drawn, such as "init".
        stage: number of the draw among those of one purpose.
        path: module path of the layer the numbers are for.
    """
    digest = hashlib.sha256(repr((seed, purpose, stage, path)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def common_seed() -> int:
    """Torch's initial seed; the first process's where several run together, which start from seeds of their own."""
    seed = [torch.initial_seed()]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed)
    return seed[0]
