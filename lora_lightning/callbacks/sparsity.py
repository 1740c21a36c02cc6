"""SparsitySchedule: entries of least averaged sensitivity go, row by row and column by column, along a cubic ramp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import Adapter, EntryMask
from lora_lightning.callbacks.keep_masks import keep_count, keep_top, kept_density, sensitivity
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, resolve_ramp, total_passes
from lora_lightning.distributed import as_shard_of, gather, gather_nested, local, own_rows, shard_like
from lora_lightning.errors import ResumeError
from lora_lightning.methods import SparsityFields, check_sparsity
from lora_lightning.models.paths import plain


@dataclass
class _Stack:
    """Masks of one shape, ranked together: scores are (len(entries), rows, n)."""

    names: list[str]
    entries: list[EntryMask]
    average: Tensor | None = None
    """Of this process's shards, stacked like scores."""
    mask: Tensor | None = None
    """Of full tensors, as are `factor` and `keep`."""
    factor: Tensor | None = None
    """`mask` in the parameters' dtype."""
    keep: int = 0
    """Entries kept in each row of `mask`."""

    def rows(self, tensors: list[Tensor]) -> Tensor:
        """Stacked, with the axis along which entries compete last."""
        return torch.stack([t if e.by_row else t.mT for t, e in zip(tensors, self.entries, strict=True)])

    def unstacked(self, average: Tensor) -> list[Tensor]:
        """The shards of an average, each laid out like its parameter."""
        parts = zip(average.unbind(), self.entries, strict=True)
        return [as_shard_of((rows if e.by_row else rows.mT).contiguous(), e.param) for rows, e in parts]


class SparsitySchedule(SparsityFields, ScheduleCallback):
    """Prunes the entries of adapters that answer `masks()`.

    Each optimizer step, |w dL/dw| (the weight before the step, the gradient before clipping) enters a moving average;
    after the step the entries of smallest average in each row or column are removed, as the adapter's mask declares.

    Where parameters are sharded on several processes, so are the averages. They are gathered together at a step that
    removes entries, and every process chooses alike from full rows and columns.

    Raises:
        SettingsError: a value outside its rule, or a schedule that does not fit the run.
        NoEffectError: no trainable adapter has entry masks.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "entry masks (masks())"

    def __post_init__(self) -> None:
        ScheduleCallback.__init__(self)
        check_sparsity(self)
        self._stacks: list[_Stack] = []
        self._saved: dict[str, Tensor] = {}
        self.start_step = self.end_step = 0  # in units of the clock
        self._now = 0
        self._current = 0.0

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters with entry masks."""
        return bool(adapter.masks())

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a ramp that does not fit; one of passes is resolved when training starts."""
        if self.clock == "steps":
            resolve_ramp(self.start, self.end, total, type(self).__name__)

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the ramp and stack masks of equal shape."""
        if self.clock == "passes":
            total, self._now = total_passes(self.trainer), self.trainer.current_epoch
        self.start_step, self.end_step = resolve_ramp(self.start, self.end, total, type(self).__name__, self.clock)
        stacks: dict[tuple[object, ...], _Stack] = {}
        for path, adapter in adapters.items():
            names = {id(parameter): name for name, parameter in adapter.named_parameters()}
            for entry in adapter.masks():
                shape = entry.param.shape if entry.by_row else entry.param.mT.shape
                cut = isinstance(entry.param, DTensor) and entry.by_row  # shards of rows and of columns differ in shape
                key = (*shape, cut, entry.effect, entry.param.device, entry.param.dtype)
                stack = stacks.setdefault(key, _Stack([], []))
                stack.names.append(plain(f"{path}.{names[id(entry.param)]}"))
                stack.entries.append(entry)
        self._stacks = list(stacks.values())
        if not (self.resumed or self._saved):
            self._start_anew()
        for stack in self._stacks:
            stack.mask = stack.rows([entry.mask for entry in stack.entries])
            stack.factor = stack.mask.to(stack.entries[0].param.dtype)
            stack.keep = int(stack.mask.sum(-1).max())
        if self._saved:
            self._restore()

    def _start_anew(self) -> None:
        """Let what an earlier run has removed compete again, from a value of zero: nothing is computed otherwise."""
        removed = total = 0
        for stack in self._stacks:
            for entry in stack.entries:
                removed, total = removed + int((~entry.mask).sum()), total + entry.mask.numel()
                if entry.effect == "mask":
                    local(entry.param.data).mul_(own_rows(entry.mask.to(entry.param.dtype), entry.param))
                entry.mask.fill_(True)
        if removed and self.trainer.is_global_zero:
            print(
                f"{type(self).__name__}: an earlier run has removed {removed:,} of {total:,} entries; they compete "
                "again, and the schedule begins anew"
            )

    def _restore(self) -> None:
        for stack in self._stacks:
            lost = [name for name in stack.names if name not in self._saved]
            if lost:
                raise ResumeError(f"the checkpoint holds no sensitivity average for {lost[0]}.")
            stack.average = stack.rows([local(shard_like(self._saved[n], e.param)) for n, e in self._named(stack)])
        self._saved = {}

    @staticmethod
    def _named(stack: _Stack) -> list[tuple[str, EntryMask]]:
        return list(zip(stack.names, stack.entries, strict=True))

    def on_gradients(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Average the sensitivities."""
        for stack in self._stacks:
            params = [e.param.detach() for e in stack.entries]
            grads = [
                torch.zeros_like(p) if (g := e.param.grad) is None else g
                for p, e in zip(params, stack.entries, strict=True)
            ]
            score = sensitivity(stack.rows([local(p) for p in params]), stack.rows([local(g) for g in grads]))
            if stack.average is None:
                stack.average = score if self.first_score == "gradient" else score.mul_(1 - self.beta)
            else:
                stack.average.lerp_(score, 1 - self.beta)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Remove what the ramp removes at this step."""
        self._now = self.trainer.current_epoch + 1 if self.clock == "passes" else step
        density = kept_density(self._now, self.start_step, self.end_step, 1 - self.sparsity)
        kept = entries = 0
        shrinking: list[tuple[_Stack, int]] = []
        for stack in self._stacks:
            mask = cast(Tensor, stack.mask)
            n = mask.shape[-1]
            keep = keep_count(density, n, self.keep_rule)
            kept, entries = kept + keep * mask.numel() // n, entries + mask.numel()
            if keep < stack.keep:  # supports are nested, so an equal count is the same set
                shrinking.append((stack, keep))
        for (stack, keep), average in zip(shrinking, _full_averages([stack for stack, _ in shrinking]), strict=True):
            self._choose(stack, average, keep)
        if density < 1:
            for stack in self._stacks:
                self._prune(stack)
        self._current = 1 - kept / entries

    def _prune(self, stack: _Stack) -> None:
        for entry, factor in zip(stack.entries, cast(Tensor, stack.factor).unbind(), strict=True):
            shard = local(entry.param)
            if entry.effect == "zero":
                shard.mul_(own_rows(factor if entry.by_row else factor.mT, entry.param))
            if self.clamp is not None:
                shard.clamp_(-self.clamp, self.clamp)

    @staticmethod
    def _choose(stack: _Stack, average: Tensor, keep: int) -> None:
        before = cast(Tensor, stack.mask)
        chosen = keep_top(average, keep)
        if bool((chosen & ~before).any()):  # equal scores: an entry that is out stays out
            chosen = keep_top(torch.where(before, average, -1.0), keep)
        stack.mask, stack.factor, stack.keep = chosen, chosen.to(stack.entries[0].param.dtype), keep
        for entry, rows in zip(stack.entries, chosen.unbind(), strict=True):
            entry.mask.copy_(rows if entry.by_row else rows.mT)

    def finished(self, step: int) -> bool:
        """Whether the ramp is over."""
        return (self._now if self.clock == "passes" else step) >= self.end_step

    def metrics(self) -> Mapping[str, float]:
        """Fraction of entries removed."""
        return {"sparsity": self._current}

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter, whatever the stacking."""
        averages: dict[str, Tensor] = {}
        for stack in self._stacks:
            if stack.average is not None:
                averages |= dict(zip(stack.names, stack.unstacked(stack.average), strict=True))
        return super().state_dict() | {"averages": gather_nested(averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages until the adapters are known."""
        super().load_state_dict(state_dict)
        self._saved = {plain(name): average for name, average in state_dict["averages"].items()}


def _full_averages(stacks: list[_Stack]) -> list[Tensor]:
    """Averages of full tensors, stacked as they were; one collective for all that are sharded."""
    averages = [cast(Tensor, stack.average) for stack in stacks]
    if not any(isinstance(entry.param, DTensor) for stack in stacks for entry in stack.entries):
        return averages
    shards = [stack.unstacked(average) for stack, average in zip(stacks, averages, strict=True)]
    found = iter(gather([shard for of_stack in shards for shard in of_stack]))
    return [stack.rows([next(found) for _ in stack.entries]) for stack in stacks]
