"""LoRA+: a higher learning rate for the second factor, around any optimizer.

Hayou et al., 2024, arXiv:2402.12354.

    lr_A = lr,   lr_B = lambda lr

    paper   here    meaning
    lambda  ratio   a number, at least 1
    B       lora_B  (d_out, r), the second factor of a pair

With B = 0 at the start, A gets no gradient until B has grown; and for wide layers the two rates should differ in order.

Departs from the paper: only second factors of pairs get the higher rate; peft gives it to one-dimensional parameters,
such as DoRA's magnitudes, as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from torch.optim import Optimizer

from lora_lightning.adapters.base import FactorPair
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.pair_optimizer import PairOptimizer
from lora_lightning.optim.wrapper import OptimizerWrapper, adamw


class LoRAPlus(OptimizerWrapper):
    """Another optimizer whose rate is `ratio` times as high for the second factors of pairs.

    Args:
        params: parameters or groups; the factor pairs arrive by `bind_pairs`.
        ratio: rate of B over the rate of A. The paper suggests 16 (4 to 32): higher for harder tasks, near 1 where
            features need not change much; take about half the rate that suits plain LoRA.
        inner: the optimizer that steps; null for AdamW at a rate of 1e-3.
    """

    bibtex: ClassVar[str] = """@inproceedings{hayou2024loraplus,
  title = {{LoRA+}: Efficient Low Rank Adaptation of Large Models},
  author = {Hayou, Soufiane and Ghosh, Nikhil and Yu, Bin},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  note = {arXiv:2402.12354}
}"""

    def __init__(self, params: Any, ratio: float = 16.0, inner: Callable[[Any], Optimizer] | None = None) -> None:
        if not ratio >= 1:
            raise SettingsError(f"LoRAPlus.ratio is {ratio!r}; it must be at least 1. Rate of B over the rate of A.")
        super().__init__((inner or adamw)(params), {"ratio": ratio})
        self.ratio = ratio
        self._split = False
        if isinstance(self.inner, PairOptimizer):
            warnings.warn(
                f"LoRAPlus around {type(self.inner).__name__}: that optimizer balances the factors itself, and a "
                "ratio of rates undoes it; use either alone.",
                stacklevel=2,
            )

    def bind_pairs(self, pairs: tuple[FactorPair, ...]) -> None:
        """Split second factors out of each group into a sibling with all its options, whose rate is `ratio` times its.

        Raises:
            TrainingError: no second factor trains here, or the groups are split already.
        """
        if self._split:
            raise TrainingError("LoRAPlus.bind_pairs was called twice; the rates would be multiplied again.")
        super().bind_pairs(pairs)
        second = {id(pair.lora_B) for pair in pairs}
        if not any(id(p) in second for group in self.param_groups for p in group["params"]):
            raise TrainingError(
                "LoRAPlus needs factor pairs whose second factor trains, and there is none; use its inner optimizer "
                "alone, or a method with factor pairs."
            )
        self.param_groups[:] = [part for group in self.param_groups for part in _split(group, second, self.ratio)]
        self._split = True

    def take_step(self) -> None:
        """The inner optimizer's step.

        Raises:
            TrainingError: `bind_pairs` was not called.
        """
        if not self._split:
            raise TrainingError(
                "LoRAPlus does not know the factor pairs; call "
                "optimizer.bind_pairs(lora_lightning.optim.groups.factor_pairs(model)) before the first step."
            )
        self.inner.step()


def _split(group: dict[str, Any], second: set[int], ratio: float) -> list[dict[str, Any]]:
    """A group without the parameters in `second`, and its sibling with them; an empty one is left out."""
    of_B = [p for p in group["params"] if id(p) in second]
    rest = [p for p in group["params"] if id(p) not in second]
    rates: dict[str, Any] = {key: group[key] * ratio for key in ("lr", "initial_lr") if key in group}
    sibling: dict[str, Any] = {**group, **rates, "params": of_B}
    if rest and "name" in group:
        sibling["name"] = f"{group['name']}.B"
    return [part for part in ({**group, "params": rest}, sibling) if part["params"]]
