"""RefreshIndex: chooses anew, every so many optimizer steps, the channels that CE-LoRA's backward pass uses.

The step before a choice is observed: backward passes of all its micro-batches add up squared gradient norms. After the
step these are summed over processes, so that all choose the same channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ll_ce_lora.adapter import CELoRAAdapter
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.distributed import gather_objects
from lora_lightning.errors import NoEffectError, ResumeError
from lora_lightning.injection.records import iter_adapters


class RefreshIndex(ScheduleCallback):
    """Refreshes adapters of CE-LoRA after step 1 and every `every_n_steps` of theirs from there on.

    Counts optimizer steps, so that neither accumulation nor recomputed activations change when it acts. A layer without
    a backward pass (its input needs no gradient) or with norms that are not finite keeps what it has; the latter is
    tried again after the next step, and so is an adapter that was started again, as in each stage of a cascade. Where
    the base weight was rewritten, its split is derived again.

    Attributes:
        refreshes: optimizer steps after which channels were chosen.

    Raises:
        NoEffectError: no trainable adapter approximates anything, or none can.
    """

    phase: ClassVar[int] = 1
    reads_base: ClassVar[bool] = True
    writes_values: ClassVar[bool] = False
    requires: ClassVar[str] = "an approximated backward pass (CELoRA with kept below 1)"

    def __init__(self) -> None:
        super().__init__()
        self.refreshes = 0
        self._window = 0
        self._last: dict[str, int] = {}
        self._chosen: set[str] = set()
        self._bases: dict[str, BaseLayer] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._saved: dict[str, Any] | None = None

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters that leave channels out."""
        return isinstance(adapter, CELoRAAdapter) and adapter.approximates

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Put back what a checkpoint holds, or start with exact backward passes."""
        self._bases, self._versions = {}, {}
        if self._saved is not None:
            self._restore(self._saved, adapters)
            self._saved = None
        elif self.last_step == 0:
            self.refreshes, self._window, self._last, self._chosen = 0, 0, {}, set()
            for adapter in adapters.values():
                cast(CELoRAAdapter, adapter).restore({})

    def _restore(self, saved: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> None:
        self.refreshes, self._window, self._last = saved["refreshes"], saved["window"], dict(saved["last"])
        everyone = saved["norms"]
        if any(everyone) and len(everyone) != _processes():
            raise ResumeError(
                f"the checkpoint holds gradient norms of {len(everyone)} processes inside an accumulation window; this "
                f"run has {_processes()}. Resume with the same number, or from a checkpoint of a whole step."
            )
        norms = everyone[_rank()] if any(everyone) else {}
        for path, adapter in adapters.items():
            own = cast(CELoRAAdapter, adapter)
            own.restore(saved["derived"].get(path, {}))
            own.seed = saved["seeds"].get(path, own.seed)
            self._chosen |= {path} if own.index is not None else set()
            if path in norms:
                own.observe(True)
                cast(Tensor, own.norms).copy_(norms[path])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Open an optimizer step's window with its first micro-batch."""
        if not self._bases:
            self._bases = bases(pl_module)
        if trainer.global_step + 1 != self._window:
            self.open_window(trainer.global_step + 1, self._adapters, self._bases)

    def open_window(self, step: int, adapters: Mapping[str, Adapter], bases: Mapping[str, BaseLayer]) -> None:
        """Observe the layers whose choice is due after `step`, and follow base weights that were rewritten."""
        self._window, self._bases = step, dict(bases)
        self._follow_resets(adapters)
        for path, adapter in adapters.items():
            own = cast(CELoRAAdapter, adapter)
            version = self._bases[path].version
            if own.row_norms is not None and self._versions.setdefault(path, version) != version:
                self._split(path, own)
            own.observe(self._due(path, step, own.every_n_steps))

    def _follow_resets(self, adapters: Mapping[str, Adapter]) -> None:
        """Have adapters choose anew that were started again since their last choice, and so have none."""
        for path in [
            path for path in self._chosen & adapters.keys() if cast(CELoRAAdapter, adapters[path]).index is None
        ]:
            self._chosen.remove(path)
            del self._last[path]

    def _due(self, path: str, step: int, period: int) -> bool:
        """Whether a multiple of the period, from step 1 on, lies between the last choice and `step`."""
        last = self._last.get(path)
        return last is None or (step - 1) // period > (last - 1) // period

    def _split(self, path: str, adapter: CELoRAAdapter) -> None:
        base = self._bases[path]
        adapter.split(base.weight())
        if torch.distributed.is_initialized():  # another device may have found other bits, and then other channels
            for derived in adapter.derived().values():
                torch.distributed.broadcast(derived, 0)
        self._versions[path] = base.version

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Choose the channels of the observed layers.

        Raises:
            NoEffectError: none of them had a backward pass.
        """
        observed = {path: cast(CELoRAAdapter, adapter) for path, adapter in adapters.items()}
        observed = {path: adapter for path, adapter in observed.items() if adapter.norms is not None}
        done = [path for path, adapter in observed.items() if self._refresh(path, adapter, step)]
        self.refreshes += bool(done)
        if observed and not self.refreshes and all(path in self._last for path in observed):
            raise NoEffectError(
                f"{type(self).__name__}: none of the {len(observed)} layers can be approximated, such as "
                f"{next(iter(observed))}: their inputs need no gradient, they are in eval mode, or hooks stand on "
                "them. Adapt deeper layers as well, or use LoRA."
            )

    def _refresh(self, path: str, adapter: CELoRAAdapter, step: int) -> bool:
        squares = _summed(cast(Tensor, adapter.norms))
        adapter.observe(False)
        if not bool(torch.isfinite(squares).all()):
            return False
        self._last[path] = step
        if not bool(squares.any()):
            return False
        if adapter.row_norms is None:
            self._split(path, adapter)
        adapter.refresh(squares, step)
        self._chosen.add(path)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What was chosen and derived, and each process's sums of an open window: derived bits differ by device."""
        self._follow_resets(self._adapters)
        own = {path: cast(CELoRAAdapter, adapter) for path, adapter in self._adapters.items()}
        norms = {path: adapter.norms.cpu() for path, adapter in own.items() if adapter.norms is not None}
        return super().state_dict() | {
            "refreshes": self.refreshes,
            "window": self._window,
            "last": dict(self._last),
            "derived": {path: adapter.derived() for path, adapter in own.items()},
            "seeds": {path: adapter.seed for path, adapter in own.items()},
            "norms": gather_objects(norms),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the adapters are known."""
        super().load_state_dict(state_dict)
        self._saved = state_dict


def bases(module: torch.nn.Module) -> dict[str, BaseLayer]:
    """Base layers by the module path of each adapter on them."""
    return {
        f"{path}.adapters.{name}": layer.base_layer for path, layer in iter_adapters(module) for name in layer.adapters
    }


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _summed(squares: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(squares)
    return squares
