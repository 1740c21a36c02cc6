"""Linked: what stands above one layer, so that adapters of several layers read it: shared factors, gates of a block.

A linked module lies once in the model, at `<owner>.adapters.<name>.<tensor>`, where the owner is a module around the
layers that read it. Adapters refer to it in `Adapter.linked`, a plain dictionary that registers nothing. So its tensors
are listed, saved, moved, cast and sharded once, and a copy of the model has copies that refer to one another.

    adapter.linked["factors"].lora_A      read at each call: under FSDP2 another tensor stands there in each forward
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.precision import kept


class Linked(nn.Module, ABC):
    """A module above one layer; `Method.link` makes it. Tensors that do not train are buffers, as in an adapter.

    Attributes:
        group: name of the optimizer group that its parameters belong to where the method names no groups.
        in_half: True where the tensors may be cast to half precision with the model; small updates are then lost.
    """

    group: ClassVar[str] = "other"
    in_half: bool = False

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Write start values in place; numbers are drawn whole, on the CPU, in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts of a model, of which those to half precision are not for what trains."""
        return cast(Self, super()._apply(kept(fn, lambda _: not self.in_half), recurse))  # type: ignore[no-untyped-call]


class LinkedAdapters(nn.ModuleDict):
    """The linked modules of one owner, by adapter name; its attribute `adapters`."""

    def forward(self, x: Any) -> Any:
        """`x` as it is: an owner that calls all its children in a row, as nn.Sequential does, calls this one too."""
        return x
