"""RiemannianSGD and RiemannianAdamW: scaled gradient descent and scaled AdamW for anything that has factor pairs.

Zhang and Pilanci, 2024, arXiv:2402.02347; per expert: Sun et al., 2025, arXiv:2502.15828. The preconditioner and its
symbols are in `preconditioner.py`; Adam's moments are built from the preconditioned gradients.

    scaled GD      A = A - lr dA,   B = B - lr dB
    scaled AdamW   A = A - lr Adam(dA),   B = B - lr Adam(dB)

To first order scaled GD moves the weight by -lr s^2 (P_B G + G P_A), with G its gradient, P_B and P_A the projections
on the columns of B and the rows of A: the same rate goes s^2 times as far at another scaling s = alpha / r, unless
`divide_by_scaling_sq` is on.

Departs from the papers: both sides are preconditioned with the factors before the step, as in the equations and the
released SGD; the released AdamW sees the new A, which is `order="gauss_seidel"`. Adam's bias correction is on, eps
comes after it and the decay before the step; the released code has it off, and the other order
(`adam_form="transformers"`). Parameters in no pair (heads, magnitudes, routers) take plain SGD or AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from ll_optimizers.preconditioner import direction
from lora_lightning.optim.directions import AdamForm, Directions, adam, descend
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings, one_of
from lora_lightning.optim.pairs import Part, Side, factorise, grams, stack_pairs

Order = Literal["jacobi", "gauss_seidel"]

_RULES = {"order": one_of("jacobi", "gauss_seidel")}
_READ: dict[Side, tuple[Part, Part]] = {"A": ("B", "grad_A"), "B": ("A", "grad_B")}
"""What the step of one side reads: its partner, and its gradient."""
_PARTNER: dict[Side, Side] = {"A": "B", "B": "A"}


BIBTEX = """@inproceedings{zhang2024riemannian,
  title = {Riemannian Preconditioned {LoRA} for Fine-Tuning Foundation Models},
  author = {Zhang, Fangzhao and Pilanci, Mert},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  note = {arXiv:2402.02347}
}"""


class RiemannianSGD(PairOptimizer):
    """Scaled gradient descent: each factor's gradient is multiplied by the inverse Gram of its partner.

    Args:
        params: parameters or groups; the factor pairs arrive by `bind_pairs`.
        lr: learning rate. The published runs use 5e-3 and less; sizes of steps grow with (alpha / r)^2.
        damping: added to the diagonal of each Gram. A gradient grows at most 1 / (2 sqrt(damping)) fold, just after B
            has left zero; the published values lie between 1e-7 and 100, so it is worth tuning.
        order: "jacobi" steps both sides from the factors before the step, "gauss_seidel" steps B from the new A.
        weight_decay: fraction lr * weight_decay by which parameters shrink at each step.
        divide_by_scaling_sq: divide by (alpha / r)^2, so that one rate serves layers of different scaling.
    """

    bibtex: ClassVar[str] = BIBTEX

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        damping: float = 1e-4,
        order: Order = "jacobi",
        weight_decay: float = 0.0,
        divide_by_scaling_sq: bool = False,
    ) -> None:
        settings = {"damping": damping, "order": order, "divide_by_scaling_sq": divide_by_scaling_sq}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, settings)
        check_settings(self, _RULES)

    def take_step(self) -> None:
        """Preconditioned gradient descent."""
        _step(self, lambda directions: descend(self, directions))


class RiemannianAdamW(PairOptimizer):
    """Scaled AdamW: as RiemannianSGD, with Adam's moments built from the preconditioned gradients.

    Args:
        params: parameters or groups; the factor pairs arrive by `bind_pairs`.
        lr: learning rate. The published runs on language models use 1e-5 to 5e-5 (2e-4 for GPT-2).
        betas: memory of Adam's first and second moment.
        eps: added to the root of the second moment.
        weight_decay: fraction lr * weight_decay by which parameters shrink at each step.
        damping: added to the diagonal of each Gram; the published values lie between 1e-7 and 100.
        order: "jacobi" steps both sides from the factors before the step, "gauss_seidel" steps B from the new A.
        bias_correction: divide the moments by 1 - beta^t; False reproduces the released language-model code.
        divide_by_scaling_sq: divide the preconditioned gradients by (alpha / r)^2, which matters to Adam through eps.
        adam_form: "torch" adds eps after the bias correction and decays before the step; "transformers" adds it before
            and decays after, as the released code does.
    """

    bibtex: ClassVar[str] = BIBTEX

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        order: Order = "jacobi",
        bias_correction: bool = True,
        divide_by_scaling_sq: bool = False,
        adam_form: AdamForm = "torch",
    ) -> None:
        settings = {
            "damping": damping,
            "order": order,
            "bias_correction": bias_correction,
            "divide_by_scaling_sq": divide_by_scaling_sq,
            "adam_form": adam_form,
        }
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, settings)
        check_settings(self, _RULES)

    def take_step(self) -> None:
        """AdamW on preconditioned gradients."""
        corrected, form = self.defaults["bias_correction"], self.defaults["adam_form"]
        _step(self, lambda directions: descend(self, adam(self, directions, corrected, form), form))


def _step(optimizer: PairOptimizer, step: Callable[[Directions], None]) -> None:
    """Step both sides at once, or B after A; then the parameters in no pair."""
    orders: dict[str, tuple[tuple[Side, ...], ...]] = {"jacobi": (("A", "B"),), "gauss_seidel": (("A",), ("B",))}
    for sides in orders[optimizer.defaults["order"]]:
        step(_preconditioned(optimizer, sides))
    step(optimizer.plain_gradients())


def _preconditioned(optimizer: PairOptimizer, sides: tuple[Side, ...]) -> dict[Tensor, Tensor]:
    """Directions of the factors of `sides` that have a gradient; one half of a pair may have none."""
    found: dict[Tensor, Tensor] = {}
    stacks = [
        (stack, side)
        for side in sides
        for stack in stack_pairs(optimizer.with_gradient(side), _READ[side], sharded=True)
    ]
    partners = factorise(grams([(stack, _PARTNER[side]) for stack, side in stacks]), optimizer.defaults["damping"])
    for (stack, side), partner in zip(stacks, partners, strict=True):
        optimizer.count_damped(stack, partner, side)
        steps = direction(stack, side, partner)
        if optimizer.defaults["divide_by_scaling_sq"]:
            steps = steps / stack.scaling[stack.held(side)] ** 2
        found |= stack.own(steps, side)
    return found
