"""Adapter: the law every method's module obeys, and the questions it may answer.

The law: applying the adapter equals the plain layer with the merged weight and bias.

    adapter(x, base) == base.apply(x, adapter.merged_weight(base.weight()), adapter.merged_bias(base.bias))

Optimizers and callbacks ask questions (`factor_pairs`, `masks`, `rank_mask`, ...); they never look at parameter names.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.adapters.precision import kept
from lora_lightning.distributed import put
from lora_lightning.errors import SettingsError


@dataclass(frozen=True)
class FactorPair:
    """Two factors of which the function depends only on `scaling * lora_B @ lora_A`.

    Attributes:
        name: what tells the pair from others of one adapter; empty where there is one.
        lora_A: (*lead, rank, d_in); `lead` is () or, for stacked experts, (E,). A buffer where it is frozen.
        lora_B: (*lead, d_out, rank), likewise.
        scaling: number on the product.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class Approximation:
    """A fixed update that stands for one that depends on the input.

    Attributes:
        A: (R, d_in), detached.
        B: (d_out, R), detached; the update is B A.
        error: size of what it leaves out over the size of what it stands for, as measured while training.
    """

    A: Tensor
    B: Tensor
    error: float


@dataclass(frozen=True)
class EntryMask:
    """Entries of one parameter that a schedule may remove.

    Attributes:
        param: the parameter, of the adapter itself.
        mask: bool buffer of the adapter, shaped like `param`; True where the entry is kept.
        along: axis along which entries compete: -1 within each row, -2 within each column.
        effect: what happens to an entry that is off. "zero": the schedule writes zero, and the entry may regrow;
            "mask": the adapter multiplies the mask in, in its `forward`; "hold": the value stays as it is.
    """

    param: nn.Parameter
    mask: Tensor
    along: int
    effect: Literal["zero", "mask", "hold"]

    @property
    def by_row(self) -> bool:
        """Whether entries compete within rows, the last axis."""
        return self.along in (-1, self.param.dim() - 1)


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """A named group of trainable parameters, as a method wants it optimised.

    Attributes:
        params: trainable parameters of the group.
        lr_ratio: learning rate of the group over the optimizer's.
        weight_decay: weight decay of the group; None keeps the optimizer's.
        clip: largest gradient norm of the group; None uses the trainer's `gradient_clip_val` over the remaining groups.
    """

    params: Sequence[nn.Parameter]
    lr_ratio: float = 1.0
    weight_decay: float | None = None
    clip: float | None = None


class RunningSum:
    """Sum and count of a forward- or backward-time statistic; not a buffer, empty at step boundaries.

    Attributes:
        sum: sum of what was added, detached; None where nothing was.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self._count: Tensor | None = None  # a compiled block would be compiled anew for each number

    @property
    def count(self) -> int:
        """Number of observations in the sum."""
        return 0 if self._count is None else int(self._count)

    def add(self, values: Tensor, count: int = 1) -> None:
        """Add `values`, a sum over `count` observations."""
        values = values.detach()
        if self.sum is None or self._count is None:
            self.sum, self._count = values.clone(), torch.full((), count, device=values.device)
        else:
            self.sum, self._count = self.sum.add_(values), self._count.add_(count)

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor | None:
        """Mean over all processes, after which the running_sum is empty; None where nothing was observed.

        Args:
            reduce: sums a tensor over processes; called by none of them or by all, so all must have observed something.
        """
        if self.sum is None or self._count is None:
            return None
        mean = reduce(self.sum) / reduce(self._count.float())
        self.sum, self._count = None, None
        return mean


class Adapter(nn.Module, ABC):
    """One method's module on one layer. Holds the trained tensors; the layer itself is handed in at each call.

    Where parameters are sharded on several processes, callbacks ask questions about their values inside
    `distributed.assembled`, so that an answer is computed from full tensors and is the same on all of them.

    Attributes:
        additive: True where the update does not depend on the base weight, so that several adapters on one layer add
            up. False refuses a second active adapter on the layer, unless `stacks`.
        stacks: True where several on one layer are applied in their order, each to what those before it give, while
            what one reads of the base weight is that of `base.beneath`. It then answers `merged_onto`.
        mergeable: False where the update depends on the input, so that no merged weight exists; equal to the settings
            class's `mergeable`.
        keeps_zeros: True where weights that are zero stay so, which noise on the weight would fill: it is refused then.
        replaces_weight: True where the layer is called with another weight in place of its own, which FSDP1 cannot do.
        in_half: True where the tensors may be cast to half precision with the model; small updates are then lost.
            False keeps them in float32 when `model.half()` or `model.to(torch.bfloat16)` is called.
        rank_mask: bool buffer (rank,), multiplied into the rank components; None where components cannot be removed.
            An adapter that has one registers it again, and answers `rank_scores`.
        resting: True while a schedule lets the adapter rest: its tensors then get no gradient, and nothing is amiss.
        linked: modules above the layer that the adapter reads, by its own names for them; `Method.link` sets it.
        peers: adapters of earlier layers whose tensors it reads as its own, nearest first; `Method.link` sets it.
        reads_context: True where it leaves values for later layers or reads those of earlier ones, so that a forward of
            the model keeps them (`injection.gates`).
        reads_peers: True where `Method.link` may set peers, so that its update is not in its own tensors alone.
    """

    additive: bool = False
    stacks: bool = False
    mergeable: bool = True
    keeps_zeros: bool = False
    replaces_weight: bool = False
    in_half: bool = False
    resting: bool = False
    rank_mask: Tensor | None
    linked: Mapping[str, Linked] = MappingProxyType({})
    peers: tuple[Adapter, ...] = ()
    reads_peers: bool = False
    reads_context: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rank_mask", None)  # registered again by an adapter that has one

    @abstractmethod
    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """Output of the adapted layer, in the base layer's output dtype."""

    @abstractmethod
    def merged_weight(self, weight: Tensor) -> Tensor:
        """Weight of the plain layer that computes the same, (*lead, d_out, d_in); differentiable, fp32 in, fp32 out."""

    def merged_onto(self, weight: Tensor, plain: Tensor) -> Tensor:  # noqa: ARG002 - for those that stack
        """`merged_weight` of a weight that holds adapters already, beside the one without, (*lead, d_out, d_in) all."""
        return self.merged_weight(weight)

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Write start values in place; numbers are drawn for the full tensor, on the CPU, in float32."""

    def begin_stage(self, stage: int) -> None:
        """Write what differs between stages of a cascade, in place; `stage` counts from 0, and `reset` has gone before.

        What it writes lies in buffers, so that a resumed run and whoever loads the adapter have it.
        """

    def shrink(self, kept: float) -> bool:  # noqa: ARG002 - a question with a default answer
        """Multiply the update by `kept`, in [0, 1], by values written in place, as evenly as its trained factors allow.

        False where no values do so, and nothing is then done.
        """
        return False

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Bias of the plain layer that computes the same, (d_out,)."""
        return bias

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Detached (A (R, d_in), B (d_out, R)) with update == B @ A exactly, scaling included; None if not low rank."""
        return None

    def approximation(self) -> Approximation | None:
        """A fixed product in place of an update that depends on the input; None where the adapter offers none.

        Raises:
            AdapterStateError: it rests on what is measured while training, and nothing has been.
        """
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts of a model, of which those to half precision are not for what trains."""
        return cast(Self, super()._apply(kept(fn, lambda _: not self.in_half), recurse))  # type: ignore[no-untyped-call]

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        """Own factor pairs, in the order of `param_groups`; a frozen side is listed as well, a shared factor is not."""
        return ()

    def stated_pair(self) -> FactorPair | None:
        """The update as one pair, detached, removed rank components left out: what a file of factors states of it.

        None where the adapter owns none, or several.
        """
        pairs, mask = self.factor_pairs(), self.rank_mask
        if len(pairs) != 1:
            return None
        A, B = pairs[0].lora_A.detach(), pairs[0].lora_B.detach()
        kept = slice(None) if mask is None else mask
        return replace(pairs[0], lora_A=A[..., kept, :], lora_B=B[..., kept])

    def own_factors(self) -> tuple[Tensor, Tensor]:
        """The two tensors that the factors of a file are read into: those of the one pair."""
        (pair,) = self.factor_pairs()
        return pair.lora_A, pair.lora_B

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """Own tensors by their names in peft's format: (d_out,) or (rank,) beside the one pair of `stated_pair`.

        For a type of the method's own they are all of them, in the file's layout and views of what trains.
        """
        return {}

    def rank_scores(self) -> Tensor | None:
        """Importance of each rank component, (rank,), equal on all processes; None where there is no rank mask."""
        return None

    def masks(self) -> tuple[EntryMask, ...]:
        """Entry-wise masks a sparsity schedule may write."""
        return ()

    def statistics(self) -> Mapping[str, RunningSum]:
        """Statistics collected since the last optimizer step."""
        return {}

    def idle(self) -> frozenset[str]:
        """Names of own trainables that may have no gradient now."""
        return frozenset()


def check_name(name: str) -> None:
    """Raise `SettingsError` unless `name` can be a module name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise SettingsError(
            f'adapter name is "{name}"; it must be letters, digits, "_" or "-", and none of the words '
            'a module dictionary owns, such as "keys" or "type".'
        )


def write_values(target: Tensor, values: Tensor) -> None:
    """Copy `values`, a full tensor that is equal on all processes, into a parameter or buffer, in its dtype."""
    put(target, values.to(target.dtype))


def write_zeros(target: Tensor) -> None:
    """Write zeros."""
    with torch.no_grad():
        target.zero_()


def write_uniform(target: Tensor, generator: torch.Generator) -> None:
    """Write U(-1/sqrt(n), 1/sqrt(n)), n the length of a row: torch's start of a linear layer."""
    drawn = torch.rand(target.shape, generator=generator, device=generator.device)
    write_values(target, (2 * drawn - 1) / math.sqrt(target.shape[-1]))


def check_rank(base: BaseLayer, rank: int, name: str = "rank") -> None:
    """Raise `SettingsError` if `rank`, the setting called `name`, is above the smaller side of the layer."""
    largest = min(base.d_in, base.d_out)
    if rank > largest:
        raise SettingsError(
            f"{name} is {rank}; a layer of {base.d_in} inputs and {base.d_out} outputs takes at most {largest}."
        )


def check_dropout(base: BaseLayer, dropout: float) -> None:
    """Raise `SettingsError` for dropout where no input passes through the adapter: token ids, stacked experts."""
    if base.kind == "experts" and dropout:
        raise SettingsError(
            f"dropout is {dropout}; stacked experts take their update as a weight, without its input, so it must be 0 "
            "there: give overrides for them, or exclude them."
        )
    if base.kind == "embedding" and dropout:
        raise SettingsError(f"dropout is {dropout}; an embedding has token ids as input, so it must be 0 there.")


def linked_modules(adapters: Iterable[Adapter]) -> list[Linked]:
    """What the adapters read above their layers, each once."""
    return list({id(module): module for adapter in adapters for module in adapter.linked.values()}.values())


def trains(adapter: Adapter) -> bool:
    """Whether a parameter of the adapter, or of what it reads above its layer, trains."""
    return any(p.requires_grad for module in (adapter, *adapter.linked.values()) for p in module.parameters())


def pair_groups(adapters: Mapping[str, Adapter]) -> dict[str, GroupSpec]:
    """Trainables in groups "A" and "B" (sides of factor pairs) and "other"; empty groups are left out.

    Those of linked modules are in the group that their class names.
    """
    groups: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "other": []}
    for adapter in adapters.values():
        side = {id(pair.lora_A): "A" for pair in adapter.factor_pairs()}
        side |= {id(pair.lora_B): "B" for pair in adapter.factor_pairs()}
        for parameter in adapter.parameters():
            groups[side.get(id(parameter), "other")].append(parameter)
    for module in linked_modules(adapters.values()):
        groups.setdefault(module.group, []).extend(module.parameters())
    return {name: GroupSpec(params=params) for name, params in groups.items() if params}
