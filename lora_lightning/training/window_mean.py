"""WindowMean: the mean loss since the last time that the run has logged, over batches, steps and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_lightning.models.tasks.base import Loss


class WindowMean:
    """Sums of losses and of what they are sums over, so that every token, or example, counts once.

    Each process holds sums of its own; `mean` adds those of all.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2,): losses, counts
        self._saved: tuple[float, float] | None = None
        self._begins = False

    def add(self, loss: Loss) -> None:
        """Add a micro-batch; to nothing where the window before it has been closed."""
        new = torch.stack([loss.total.detach(), loss.count.to(loss.total.device)])
        new = new.to(torch.float32 if new.device.type == "mps" else torch.float64)  # MPS has no float64
        if self._saved is not None:
            self._sums, self._saved = new.new_tensor(self._saved), None
        self._sums = new if self._begins or self._sums is None else self._sums + new
        self._begins = False

    def mean(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean so far.

        Args:
            total: the sum of a tensor over the processes; all of them take part.
        """
        assert self._sums is not None  # a micro-batch has been added
        loss, count = total(self._sums.clone()).unbind()
        return loss / count.clamp_min(1)

    def close(self) -> None:
        """Let the next micro-batch begin a window."""
        self._begins = True

    def state(self) -> list[float]:
        """The open window's sums on this process; zeros where none is open."""
        if self._saved is not None:
            return list(self._saved)
        return [0.0, 0.0] if self._begins or self._sums is None else [float(value) for value in self._sums]

    def load(self, states: Sequence[Sequence[float]], rank: int, processes: int) -> None:
        """Go on from the states of all processes; where they were others, the first takes everything."""
        mine = [states[rank]] if len(states) == processes else states if rank == 0 else []
        self._saved = (sum(state[0] for state in mine), sum(state[1] for state in mine))


class WindowMeans:
    """What a run logs while it trains: the loss, what stands beside it, a penalty, each the mean of its window."""

    def __init__(self) -> None:
        self._means: dict[str, WindowMean] = {}

    def add(self, loss: Loss, penalty: Tensor | None) -> None:
        """Add a micro-batch: its loss and the numbers beside it count by what the loss counts, a penalty once."""
        count = loss.count.to(loss.total.device)
        added = {"train_loss": loss}
        added |= {f"train_{name}": Loss(value * count, count) for name, value in loss.beside.items()}
        if penalty is not None:
            added["penalty"] = Loss(penalty, torch.ones_like(penalty))
        for name, one in added.items():
            self._means.setdefault(name, WindowMean()).add(one)

    def means(self, total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Each mean so far, by the name it is logged under; `total` as of `WindowMean.mean`."""
        return {name: mean.mean(total) for name, mean in self._means.items()}

    def close(self) -> None:
        """Let the next micro-batch begin a window."""
        for mean in self._means.values():
            mean.close()

    def state(self) -> dict[str, list[float]]:
        """The open windows' sums on this process by name."""
        return {name: mean.state() for name, mean in self._means.items()}

    def load(self, states: Sequence[dict[str, list[float]] | list[float]], rank: int, processes: int) -> None:
        """Go on from the states of all processes; older ones hold the sums of the loss alone."""
        named = [state if isinstance(state, dict) else {"train_loss": state} for state in states]
        for name in named[0]:
            self._means.setdefault(name, WindowMean()).load([state[name] for state in named], rank, processes)
