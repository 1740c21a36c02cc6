"""ParameterTables: numbers of a schedule for each entry of some parameters, such as averages, saved whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_lightning.distributed import as_shard_of, gather, gather_nested, local, shard_like
from lora_lightning.errors import ResumeError

Tables = Mapping[str, Mapping[str, Tensor]]
"""Tensors by kind and by the parameter's name."""


class ParameterTables:
    """Tensors shaped like parameters, in float32 at least; zeros, or what a checkpoint holds.

    Where parameters are sharded on several processes, so are they.

    Args:
        params: parameters by name.
        kinds: names of the tables.
        saved: what `state` gave.

    Attributes:
        params: the parameters.
        shards: this process's shard of each table's tensor for each parameter, to be changed in place.

    Raises:
        ResumeError: `saved` lacks a parameter.
    """

    def __init__(self, params: Mapping[str, Tensor], kinds: Sequence[str], saved: Tables | None = None) -> None:
        self.params = dict(params)
        self.shards: dict[str, dict[str, Tensor]] = {}
        for kind in kinds:
            self.shards[kind] = {name: self._start(kind, name, saved) for name in params}

    def _start(self, kind: str, name: str, saved: Tables | None) -> Tensor:
        param = self.params[name].detach()
        shard = local(param)
        if saved is None:
            return torch.zeros_like(shard, dtype=torch.promote_types(shard.dtype, torch.float32))
        if name not in saved.get(kind, {}):
            raise ResumeError(f'the checkpoint holds no table "{kind}" for {name}.')
        return local(shard_like(saved[kind][name], param)).clone()

    def full(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors of this process's shards, by the parameter's name; all processes take part, once."""
        laid_out = [as_shard_of(shard.contiguous(), self.params[name]) for name, shard in shards.items()]
        return dict(zip(shards, gather(laid_out), strict=True))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All tables in full, for a checkpoint; all processes take part."""
        laid_out = {
            kind: {name: as_shard_of(shard.contiguous(), self.params[name]) for name, shard in table.items()}
            for kind, table in self.shards.items()
        }
        found: dict[str, dict[str, Tensor]] = gather_nested(laid_out)
        return found
