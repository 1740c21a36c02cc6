"""RankRewrites: at the end of a stage weak rank components become copies of strong ones, as those were at its middle.

Gu et al., 2025, arXiv:2502.13604, section 4. With the weights w of all layers in falling order and C_k their sums,

    e_t = e_0 (1 + cos(pi t / end)) / 2,   pruned: those behind the first k with C_k > (1 - e_t) sum w
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lora_lightning import seeds
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weighted import WeightedAdapter
from lora_lightning.callbacks import snapshots
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.snapshots import VALUE, Snapshot
from lora_lightning.callbacks.step_counting import MASKS, adapted_layer, resolve_step
from lora_lightning.errors import SettingsError
from lora_lightning.models.paths import plain

SIDES = ("gate", "lora_A", "lora_B")


class RankRewrites(ScheduleCallback):
    """Assesses the components of all layers together, prunes the weakest and expands the strongest into their places.

    It is not function preserving; the loss rises for a moment. Every process draws the same pairs.

    Args:
        stage_steps: optimizer steps between two rewrites, of which the last leaves as many for training; up to 1 a
            fraction of all, from 2 on the number itself.
        pruned_mass: fraction of the weights that may be pruned at first.
        end: when that is 0; up to 1 a fraction of all optimizer steps, from 2 on a step number.
        details: "paper" or "released".

    Raises:
        SettingsError: a run too short for a rewrite, or an optimizer whose state is not shaped like its parameters.
        NoEffectError: no trainable adapter has weights of this kind.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "weighted rank components that may be overwritten (a WeightedAdapter)"

    def __init__(
        self, stage_steps: float, pruned_mass: float = 0.05, end: float = 0.67, details: str = "paper"
    ) -> None:
        super().__init__()
        self.stage_steps, self.pruned_mass, self.end, self.details = stage_steps, pruned_mass, end, details
        self._least = 3 if details == "released" else 2  # whose middle is another step than its end
        self.end_step = self._stage = self._rewritten = 0
        self._params: dict[str, nn.Parameter] = {}
        self._snapshot: Snapshot = {}
        self._due = 0
        """Step that the snapshot is for."""

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters whose components may be overwritten."""
        return isinstance(adapter, WeightedAdapter) and adapter.components.kind == "rewritten"

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a run in which no rewrite fits."""
        if not self.pruned_mass:
            return
        stage, end = self._resolve(total)
        last = min(end - 1, total // 2 if total else end)
        if stage > last:
            hint = (
                f"it must be at most {last}" if last >= self._least else f"a run needs {2 * self._least} steps or more"
            )
            raise SettingsError(
                f"{type(self).__name__}.stage_steps is {self.stage_steps}, here {stage}; a run of {total} steps with "
                f"end at step {end} rewrites nothing then, so {hint}. pruned_mass 0 trains without rewrites."
            )

    def _resolve(self, total: int | None) -> tuple[int, int]:
        """Steps of a stage, and the step from which on nothing is pruned; both 0 without rewrites."""
        if not self.pruned_mass:
            return 0, 0
        name = type(self).__name__
        stage = max(self._least, resolve_step(self.stage_steps, total, f"{name}.stage_steps"))
        return stage, resolve_step(self.end, total, f"{name}.end")

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Find the tensors; a snapshot that is pending goes on waiting."""
        self._stage, self.end_step = self._resolve(total)
        self._params = {plain(f"{p}.{side}"): a.get_parameter(side) for p, a in adapters.items() for side in SIDES}

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Rewrite where a snapshot is due, else take one in the second half of a stage."""
        late = self.details == "released"
        if self._snapshot and step >= self._due:
            self._rewrite(step, mass_at(step - late, self.end_step, self.pruned_mass), adapters)
            self._snapshot = {}
        if not self.pruned_mass:
            return
        due = (step // self._stage + 1) * self._stage
        fits = self.total is None or due + self._stage <= self.total
        middle = due - self._stage + self._stage // 2 + late
        if not self._snapshot and step >= middle and fits and mass_at(due - late, self.end_step, self.pruned_mass) > 0:
            self._snapshot, self._due = snapshots.take(self._params, self.trainer.optimizers), due

    def _rewrite(self, step: int, mass: float, adapters: Mapping[str, Adapter]) -> None:
        now = snapshots.take(self._params, self.trainer.optimizers)
        names = {path: [plain(f"{path}.{side}") for side in SIDES] for path in adapters}
        weights = {}
        for path, (gate, _, _) in names.items():
            rows = cast(WeightedAdapter, adapters[path]).components.weights(now[gate][VALUE])
            weights[path] = rows.reshape(-1, rows.shape[-1])
        counts = pruned_counts(weights, mass)
        self._rewritten = sum(int(count.sum()) for count in counts.values())
        for path, (gate, *factors) in names.items():
            if self.details == "released":
                for key in now[gate].keys() - {VALUE}:
                    now[gate][key].zero_()
            seed = adapted_layer(self.module, path)[2]
            for row, count in enumerate(counts[path].tolist()):
                generator = seeds.generator(seed, "beam pairing", step, plain(f"{path}.{row}"))
                P, Q = pairing(weights[path][row], count, generator)
                if count:
                    self._expand(now, gate, factors, row, P, Q)
        snapshots.write(self._params, self.trainer.optimizers, now)

    def _expand(self, now: Snapshot, gate: str, factors: list[str], row: int, P: Tensor, Q: Tensor) -> None:
        """Put copies of components Q into the places P of one row: factors of the snapshot, and their moments."""
        for name, turned in zip(factors, (False, True), strict=True):
            kept = [VALUE] if self.details == "released" else now[name].keys() & self._snapshot[name].keys()
            for key in kept:
                target, source = (_rows(table[name][key], turned)[row] for table in (now, self._snapshot))
                target[P.to(target.device)] = source[Q.to(source.device)].to(target)
        for key, values in now[gate].items():
            own = _rows(values[..., None], False)[row, :, 0]
            if key == VALUE:
                own[P.to(own.device)] = own[Q.to(own.device)] = (own[P.to(own.device)] + own[Q.to(own.device)]) / 2
            else:
                own.zero_()

    def metrics(self) -> Mapping[str, float]:
        """Components that the last rewrite has overwritten."""
        return {"rewritten": float(self._rewritten)}

    def state_dict(self) -> dict[str, Any]:
        """The snapshot that is pending, and what it is for."""
        return super().state_dict() | {"snapshot": self._snapshot, "due": self._due, "rewritten": self._rewritten}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the snapshot."""
        super().load_state_dict(state_dict)
        self._snapshot = {plain(name): tensors for name, tensors in state_dict["snapshot"].items()}
        self._due, self._rewritten = state_dict["due"], state_dict["rewritten"]


def _rows(values: Tensor, turned: bool) -> Tensor:
    """(*lead, r, n), or (*lead, n, r) that is `turned`, as a view (M, r, n)."""
    stacked = values.view(-1, *values.shape[-2:])
    return stacked.mT if turned else stacked


def mass_at(step: int, end: int, first: float) -> float:
    """Fraction e_t of the weights that may be pruned at optimizer step `step`; 0 from `end` on."""
    return first * (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0


def pruned_counts(weights: Mapping[str, Tensor], mass: float) -> dict[str, Tensor]:
    """How many components of each row are pruned, at most half of it; (M,) for weights (M, r) of a layer."""
    pooled = torch.cat([w.flatten().double().cpu() for w in weights.values()])
    falling, order = torch.sort(pooled, descending=True, stable=True)
    pruned = torch.zeros_like(pooled, dtype=torch.bool)
    if mass > 0:  # or rounding of the sums decides
        pruned[order] = falling.cumsum(0) - falling > (1 - mass) * pooled.sum()
    parts = pruned.split([w.numel() for w in weights.values()])
    counts = zip(weights.items(), parts, strict=True)
    return {path: part.view(w.shape).sum(-1).clamp(max=w.shape[-1] // 2) for (path, w), part in counts}


def pairing(weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(P, Q): the `count` weakest of weights (r,), and as many of the strongest in a drawn order."""
    order = torch.sort(weights.double().cpu(), descending=True, stable=True).indices
    drawn = torch.randperm(count, generator=generator, device=generator.device)
    return order[len(order) - count :], order[:count][drawn]
