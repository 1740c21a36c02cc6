"""LoRA-Pro: factor steps whose effect on the weight is as near the full gradient as two factors can come.

Wang et al., 2024, arXiv:2407.18242.

    h_A = (B^T B)^-1 gA / s^2 + X A
    h_B = (I - P_B) gB (A A^T)^-1 / s^2 - B X

    paper  here     shape
    A, B   A, B     (n, r, d_in), (n, d_out, r)
    gA, gB          like A and B
    s      scaling  (n, 1, 1)
    X      X        (n, r, r)    free: it cancels in the step of the weight
    P_B             projection on the columns of B

s B h_A + s h_B A = P_B G + (I - P_B) G P_A whatever X is, with G the gradient of the weight: the best approximation of
G that two factors can make. "closest" takes the X for which (h_A, h_B) stay closest to (gA, gB), the solution of
B^T B X + X A A^T = -(B^T B)^-1 gA A^T / s^2; "symmetric" gives half the overlap P_B G P_A to each side. Damping is in
the inverses, and not in the left side of that equation.

With `moments="weight"` Adam's moments m, v (d_out, d_in) are those of the weight's step g = s B h_A + s h_B A at X = 0.
Their quotient u takes the gradient's place: h_A and h_B follow from gA = s B^T u and gB = s u A^T.

Departs from the paper: a factor that is numerically rank deficient, as B is at the start, is not inverted: the other
factor's step is its raw gradient until it has grown. "symmetric" is the equation above; the released code multiplies by
a Gram where the inverse is needed. With moments of the weight the released code decays the frozen weight as well; here
it stays as it is, and factors decay as always.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.errors import TrainingError
from lora_lightning.optim.directions import adam, descend
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings, one_of
from lora_lightning.optim.pairs import Stack, gram_A, gram_B, stack_pairs

Balance = Literal["closest", "symmetric", "zero"]


def factor_steps(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: Tensor, balance: str, damping: float, smallest: float
) -> tuple[Tensor, Tensor]:
    """(h_A, h_B), like A and B.

    Args:
        A: (n, r, d_in).
        B: (n, d_out, r).
        grad_A: like A.
        grad_B: like B.
        scaling: (n, 1, 1).
        balance: which X.
        damping: added to both Grams.
        smallest: a factor counts as rank deficient where its least singular value is at most this times the other's
            largest.
    """
    p, U = _spectrum(gram_B(B))
    q, V = _spectrum(gram_A(A))
    ready_B = (p[:, 0] > smallest**2 * q[:, -1])[:, None, None]
    ready_A = (q[:, 0] > smallest**2 * p[:, -1])[:, None, None]
    of_B, of_A = _inverse(p + damping, U), _inverse(q + damping, V)
    X = _balance(-of_B @ grad_A @ A.mT / scaling**2, of_A, balance, p, U, q, V)
    half_A = of_B @ grad_A / scaling**2
    half_B = grad_B @ of_A / scaling**2
    full_A = half_A + X @ A
    full_B = half_B - B @ (of_B @ (B.mT @ half_B)) - B @ X
    both = ready_A & ready_B
    h_A = torch.where(both, full_A, torch.where(ready_B, half_A, grad_A))
    h_B = torch.where(both, full_B, torch.where(ready_A, half_B, grad_B))
    return h_A, h_B


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and not below zero, and eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0), vectors


def _inverse(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors / values[:, None, :]) @ vectors.mT


def _balance(right_side: Tensor, of_A: Tensor, balance: str, p: Tensor, U: Tensor, q: Tensor, V: Tensor) -> Tensor:
    """X, (n, r, r), from the right side of its equation, in the eigenbases of both Grams."""
    if balance == "zero":
        return torch.zeros_like(right_side)
    if balance == "symmetric":
        return right_side @ of_A / 2
    return U @ ((U.mT @ right_side @ V) / (p[:, :, None] + q[:, None, :])) @ V.mT


class LoRAPro(PairOptimizer):
    """AdamW or gradient descent on factor steps that approximate the full gradient best.

    Args:
        params: parameters or groups; the factor pairs arrive by `bind_pairs`.
        lr: learning rate; the published run uses 2e-5 with AdamW.
        rule: "adamw" builds Adam's moments from the steps, "sgd" takes them as they are.
        moments: of what "adamw" builds them: "factors", or "weight", which takes the memory of full fine-tuning (two
            tensors of the weight's size) and comes closest to it.
        betas: memory of Adam's first and second moment.
        eps: added to the root of the second moment.
        weight_decay: fraction lr * weight_decay by which parameters shrink at each step.
        balance: how the overlap of both steps is shared, which leaves the step of the weight as it is: "closest" to the
            raw gradients, "symmetric" in halves, or "zero", all of it to A.
        damping: added to the diagonals of both Grams.
        smallest: a factor is not inverted while its least singular value is at most this times the other's largest.
    """

    bibtex: ClassVar[str] = """@inproceedings{wang2025lorapro,
  title = {{LoRA-Pro}: Are Low-Rank Adapters Properly Optimized?},
  author = {Wang, Zhengbo and Liang, Jian and He, Ran and Wang, Zilei and Tan, Tieniu},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2407.18242}
}"""

    trains: ClassVar[Literal["any", "both", "B"]] = "both"

    def __init__(
        self,
        params: Any,
        lr: float = 2e-5,
        rule: Literal["adamw", "sgd"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        balance: Balance = "closest",
        damping: float = 1e-8,
        smallest: float = 1e-6,
        moments: Literal["factors", "weight"] = "factors",
    ) -> None:
        settings = {
            "rule": rule,
            "balance": balance,
            "damping": damping,
            "smallest": smallest,
            "moments": moments,
        }
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, settings)
        rules = {
            "rule": one_of("adamw", "sgd"),
            "balance": one_of("closest", "symmetric", "zero"),
            "moments": (
                lambda v: v == "factors" or (v == "weight" and rule == "adamw"),
                'it takes "factors", or "weight" where rule is "adamw".',
            ),
            "smallest": (lambda v: 0 <= v < 1, "it must lie in [0, 1). A ratio of singular values; 1e-6 is usual."),
        }
        check_settings(self, rules)

    def take_step(self) -> None:
        """Both sides from the factors before the step; a missing gradient beside a present one counts as zero."""
        of_weight, paired = self.defaults["moments"] == "weight", dict[Tensor, Tensor]()
        for stack in stack_pairs(self.with_gradient("A", "B")):
            A, B, s = stack.A, stack.B, stack.scaling
            grad_A, grad_B = stack.grad_A, stack.grad_B
            options = self.defaults["damping"], self.defaults["smallest"]
            if of_weight:
                h_A, h_B = factor_steps(A, B, grad_A, grad_B, s, "zero", *options)
                u = self._weight_adam(stack, s * (B @ h_A + h_B @ A))
                grad_A, grad_B = s * B.mT @ u, s * u @ A.mT
            h_A, h_B = factor_steps(A, B, grad_A, grad_B, s, self.defaults["balance"], *options)
            paired |= stack.own(h_A, "A") | stack.own(h_B, "B")
        found = self.plain_gradients()
        if self.defaults["rule"] == "sgd":
            descend(self, found | paired)
        elif of_weight:
            descend(self, adam(self, found) | paired)
        else:
            descend(self, adam(self, found | paired))

    def _weight_adam(self, stack: Stack, steps: Tensor) -> Tensor:
        """Adam's u of the steps of weights, (n, d_out, d_in); its moments lie in the state of each second factor."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        found = []
        for factor, step in zip(stack.factors("B"), steps.split(stack.counts), strict=True):
            if isinstance(factor, DTensor):
                raise TrainingError(
                    'LoRAPro.moments is "weight", and moments as large as the weights are not sharded. Take "factors", '
                    "or a strategy under which each process has all of the adapters, such as ddp."
                )
            state, (b1, b2), eps = self.state[factor], group_of[id(factor)]["betas"], group_of[id(factor)]["eps"]
            d = step.to(factor.dtype)
            if "weight_step" not in state:
                state |= {"weight_step": 0, "weight_avg": torch.zeros_like(d), "weight_avg_sq": torch.zeros_like(d)}
            state["weight_step"] += 1
            m, v, t = state["weight_avg"], state["weight_avg_sq"], state["weight_step"]
            m.lerp_(d, 1 - b1)
            v.mul_(b2).addcmul_(d, d, value=1 - b2)
            found.append((m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps))
        return torch.cat(found).to(steps.dtype)
