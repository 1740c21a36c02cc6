"""SlowFast: slow copies of the trainables, blended with the fast ones every few steps, around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ll_lorasc.functional import follow
from lora_lightning.errors import SettingsError, check
from lora_lightning.optim.wrapper import OptimizerWrapper, adamw


class SlowFast(OptimizerWrapper):
    """Lets another optimizer run ahead, and every few steps pulls the weights back towards slow copies.

    The average is of parameters one by one. For a pair of factors that is not the average of their products, which is
    what LoRASC's stages blend: the two are different methods and can be used together.

    Args:
        params: parameters or groups, as for any optimizer.
        inner: the optimizer that takes the steps; null for AdamW at a rate of 1e-3.
        blend: how far the slow copies follow, in (0, 1]; 1 changes nothing.
        every_n_steps: optimizer steps between two blends.

    Raises:
        SettingsError: a value outside its rule; another SlowFast inside.
    """

    former_fields: ClassVar[Mapping[str, str]] = {"share": "blend"}
    own_copies: ClassVar[tuple[str, ...]] = ("slow",)
    bibtex: ClassVar[str] = """@inproceedings{zhang2019lookahead,
  title = {Lookahead Optimizer: k steps forward, 1 step back},
  author = {Zhang, Michael R. and Lucas, James and Hinton, Geoffrey and Ba, Jimmy},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019},
  note = {arXiv:1907.08610}
}"""

    def __init__(
        self,
        params: Any,
        inner: Callable[[Any], Optimizer] | None = None,
        blend: float = 0.5,
        every_n_steps: int = 5,
    ) -> None:
        self.blend, self.every_n_steps = blend, every_n_steps
        check(0 < blend <= 1, self, "blend", "it must lie in (0, 1]. 0.5 is usual; 1 changes nothing.")
        check(every_n_steps >= 1, self, "every_n_steps", "it must be at least 1; 5 is usual.")
        made = (inner or adamw)(params)
        if "slow" in getattr(made, "copies", ()):
            raise SettingsError("SlowFast.inner holds a SlowFast already; both would keep one slow copy. Use one.")
        super().__init__(made, {"blend": blend, "every_n_steps": every_n_steps})
        for group in self.param_groups:
            group.setdefault("fast_steps", 0)

    def take_step(self) -> None:
        """Step the inner optimizer; blend where it is time."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        start = {p: p.detach().clone() for p in trained if "slow" not in self.state.get(p, {})}
        self.inner.step()
        for parameter, value in start.items():
            self.state[parameter]["slow"] = value
        for group in self.param_groups:
            group["fast_steps"] += 1
            if group["fast_steps"] % self.every_n_steps == 0:
                for parameter in group["params"]:
                    self._blend(parameter)

    def _blend(self, parameter: Tensor) -> None:
        slow = self.state.get(parameter, {}).get("slow")
        if slow is not None:
            follow(slow, parameter.data, self.blend)
