"""RankBudget: rank components of all layers compete for one budget, by smoothed sensitivity, along a cubic ramp.

    I = |w dL/dw|,   Ibar <- b1 Ibar + (1 - b1) I,   U <- b2 U + (1 - b2) |I - Ibar|,   s(w) = Ibar U
    S_i = s(gate_i) + mean_j s(A_ij) + mean_j s(B_ji)

Zhang et al., 2023, arXiv:2303.10512, equations 7 to 12, with the updated average in U as in the released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weighted import WeightedAdapter
from lora_lightning.callbacks.keep_masks import keep_best, kept_density, sensitivity
from lora_lightning.callbacks.parameter_tables import ParameterTables
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import MASKS, resolve_ramp
from lora_lightning.distributed import gather, local, own_rows
from lora_lightning.errors import check
from lora_lightning.models.paths import plain

SIDES = ("gate", "lora_A", "lora_B")


class RankBudget(ScheduleCallback):
    """Keeps those rank components of adapters with weights that score highest over all layers, ever fewer of them.

    Only weights of components are written: factors and the optimizer's state stay, so one that was left out may come
    back until the ramp ends. From then on the choice stands, and is written after each step. Where parameters are
    sharded on several processes, so are the averages; they are gathered at a step that chooses.

    Args:
        budget: fraction of the components of all layers that is left at the end.
        start: when the budget starts to shrink; up to 1 a fraction of all optimizer steps, from 2 on a step number.
        end: when it has shrunk, in the same unit.
        every_n_steps: steps between two choices.
        beta1: memory of the averaged sensitivity.
        beta2: memory of the averaged distance from it.
        scored: "after_step" or "before_step": the weights that enter the sensitivity.

    Raises:
        SettingsError: a value outside its rule, or a schedule that does not fit the run.
        NoEffectError: no trainable adapter has components that compete.
    """

    phase: ClassVar[int] = MASKS
    requires: ClassVar[str] = "weights of rank components that compete for a budget (a WeightedAdapter)"

    def __init__(
        self,
        budget: float,
        start: float = 0.1,
        end: float = 0.5,
        every_n_steps: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        scored: str = "after_step",
    ) -> None:
        super().__init__()
        self.budget, self.start, self.end, self.every_n_steps = budget, start, end, every_n_steps
        self.beta1, self.beta2, self.scored = beta1, beta2, scored
        check(0 < budget <= 1, self, "budget", "it must lie in (0, 1]. Fraction of the components that is left.")
        check(every_n_steps >= 1, self, "every_n_steps", "it must be at least 1.")
        self.start_step = self.end_step = 0
        self._rank = 0.0
        self._tables = ParameterTables({}, ())
        self._grads: dict[str, Tensor] = {}
        self._pattern: dict[str, Tensor] = {}
        self._saved: dict[str, dict[str, Tensor]] | None = None

    def accepts(self, adapter: Adapter) -> bool:
        """Adapters whose components compete."""
        return isinstance(adapter, WeightedAdapter) and adapter.components.kind == "budgeted"

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a ramp that does not fit."""
        resolve_ramp(self.start, self.end, total, type(self).__name__)

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the ramp; begin with averages of zero, or those of the checkpoint."""
        self.start_step, self.end_step = resolve_ramp(self.start, self.end, total, type(self).__name__)
        names = [(plain(f"{path}.{side}"), a.get_parameter(side)) for path, a in adapters.items() for side in SIDES]
        self._tables = ParameterTables(dict(names), ("smooth", "spread"), self._saved)
        self._pattern, self._saved = (self._saved or {}).get("pattern", {}), None

    def on_gradients(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Take the gradients into the averages, or keep them for the weights after the step."""
        if step < self.end_step:
            grads = {name: p.grad for name, p in self._tables.params.items() if p.grad is not None}
            self._grads = {name: local(grad).clone() for name, grad in grads.items()}  # clipping writes into them
            if self.scored == "before_step":
                self._average()

    def _average(self) -> None:
        smooth, spread = self._tables.shards.values()
        for name, param in self._tables.params.items():
            shard = local(param.detach())
            grad = self._grads.pop(name, None)  # none where the layer was not reached
            grad = shard.new_zeros(shard.shape) if grad is None else grad
            average(shard, grad, smooth[name], spread[name], self.beta1, self.beta2)

    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Choose where the schedule says so; write zeros to the weights of what is left out."""
        if step < self.end_step and self.scored == "after_step":
            self._average()
        if step >= self.end_step:
            self._pattern = self._pattern or self._choose(step)
            self._write(self._pattern)
        elif step > self.start_step and step % self.every_n_steps == 0:
            self._write(self._choose(step))
        gates = gather([adapter.get_parameter(SIDES[0]).detach() for adapter in adapters.values()])
        self._rank = sum(int(gate.count_nonzero()) / gate[..., 0].numel() for gate in gates) / len(gates)

    def _choose(self, step: int) -> dict[str, Tensor]:
        """Which components of each layer are among the best of all layers, by the name of its weights."""
        smooth, spread = self._tables.shards.values()
        full = list(self._tables.full({name: smooth[name] * spread[name] for name in smooth}).values())
        names = [name for name in smooth if name.endswith(f".{SIDES[0]}")]
        scores = {name: component_scores(*full[3 * i : 3 * i + 3]) for i, name in enumerate(names)}
        total = sum(score.numel() for score in scores.values())
        last = max(1, round(self.budget * total))
        density = kept_density(step, self.start_step, self.end_step, last / total)
        return keep_best(scores, int(density * total + 1e-9))

    def _write(self, pattern: Mapping[str, Tensor]) -> None:
        for name, mask in pattern.items():
            shard = local(self._tables.params[name].detach())
            shard.mul_(own_rows(mask, self._tables.params[name]).to(shard))

    def finished(self, step: int) -> bool:
        """Whether the ramp is over."""
        return step >= self.end_step

    def metrics(self) -> Mapping[str, float]:
        """Mean rank of a layer."""
        return {"rank": self._rank}

    def state_dict(self) -> dict[str, Any]:
        """Both averages by parameter, and the choice that stands."""
        return super().state_dict() | self._tables.state() | {"pattern": self._pattern}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages until the adapters are known."""
        super().load_state_dict(state_dict)
        tables = ("smooth", "spread", "pattern")
        self._saved = {kind: {plain(name): t for name, t in state_dict[kind].items()} for kind in tables}


def average(weight: Tensor, grad: Tensor, smooth: Tensor, spread: Tensor, beta1: float, beta2: float) -> None:
    """Take the sensitivity into both averages, in place; all of the shape of `weight`."""
    score = sensitivity(weight, grad)
    smooth.lerp_(score, 1 - beta1)
    spread.lerp_((score - smooth).abs(), 1 - beta2)


def component_scores(gate: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """S (*lead, rank) from the scores of weights (*lead, rank), A (*lead, rank, d_in) and B (*lead, d_out, rank)."""
    return gate + A.mean(-1) + B.mean(-2)
