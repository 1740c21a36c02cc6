"""LoRA-RITE: an adaptive step of the product B A that does not depend on how the product is factorised.

Yen et al., 2024, arXiv:2410.20625. Both factors are tall here, and a partner is the other one:

    L = A^T = U_L R_L,   R = B = U_R R_R            polar: U orthonormal columns, R_* symmetric
    h   = g R_p^-1                                   p the partner: free of its size
    P   = U_p^T U_p,before                           change of the partner's basis; 0 at the first step
    e   = min(max_i(v_i - w_i)+, (tr V - tr P V P^T)+)    v, w eigenvalues of V and P V P^T
    rho = b2_t (rho + e)
    V   = (1 - b2_t) h^T h / d + b2_t P V P^T
    S   = h (V + rho I)^-1/2
    M   = (1 - b1_t) S + b1_t M P^T
    L   = L - lr (M R_p^-1 + wd L)                   b_t = b (1 - b^t) / (1 - b^(t+1)), t from 0

    paper     here             shape
    L, R      tall             (n, d, r)
    R_p^-1    root_inverse     (n, r, r)
    U         basis            (n, d, r)   state of its factor, laid out like it
    M         momentum         (n, d, r)   state, laid out like its factor
    V, rho    second, escaped  (n, r, r), (n,)   state

Between h and V come two valves of the authors' code: a side whose h is too large is skipped (as if its gradient were
zero), and h of all layers is clipped by one norm.

Departs from the paper: polar in place of QR, which gives the same product and is unique; V is an exponential average
as in the authors' code; escaped mass is off unless asked for, as there. Eigenvalues are kept above a floor, where the
authors' code loses the whole step to a negative rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lora_lightning.distributed import as_shard_of, full_tensor, gather_nested, local
from lora_lightning.optim.directions import adam, descend
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings
from lora_lightning.optim.pairs import Side, Stack, stack_pairs

States = Mapping[Tensor, dict[str, Any]]
"""State by factor, every tensor in it full. `second` may have the shape of a factor; then a resumed one lies like it
until the first step, and is gathered with the others."""

CUT_OFF = torch.finfo(torch.float32).eps
"""Singular values of a factor at most rank times this times the largest count as zero."""


@dataclass(frozen=True)
class Polar:
    """tall = basis @ root, the root symmetric; directions that the factor lacks are zero in both."""

    basis: Tensor
    """(n, d, r)"""
    root_inverse: Tensor
    """(n, r, r)"""


def polar(tall: Tensor) -> Polar:
    """Of (n, d, r), through the eigenvalues of its Gram."""
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    sizes = values.clamp_min(0).sqrt()
    kept = sizes > tall.shape[-1] * CUT_OFF * sizes[:, -1:]
    inverse = torch.where(kept, 1 / torch.where(kept, sizes, 1), 0)
    root_inverse = (vectors * inverse[:, None, :]) @ vectors.mT
    return Polar(tall @ root_inverse, root_inverse)


@dataclass(frozen=True)
class Moments:
    """State of one side of a stack."""

    momentum: Tensor
    second: Tensor
    escaped: Tensor


@dataclass(frozen=True)
class Options:
    """What the rule of one side needs besides tensors."""

    betas: tuple[float, float]
    eps: float
    floor: float
    escaped_mass: bool


def decay(beta: float, t: Tensor) -> Tensor:
    """b (1 - b^t) / (1 - b^(t+1)), (n,): Adam's bias correction as a decay; zero at t = 0."""
    return beta * (1 - torch.pow(beta, t)) / (1 - torch.pow(beta, t + 1))


def advance(h: Tensor, P: Tensor, before: Moments, t: Tensor, options: Options) -> Moments:
    """The moments after a step with the unmagnified gradient h (n, d, r); P (n, r, r), t (n,)."""
    b1, b2 = (decay(beta, t)[:, None, None] for beta in options.betas)
    carried = P @ before.second @ P.mT
    escaped = before.escaped
    if options.escaped_mass:
        escaped = b2[:, 0, 0] * (escaped + lost_mass(before.second, carried))
    second = (1 - b2) * (h.mT @ h) / h.shape[1] + b2 * carried
    direction = h @ inverse_root(second, escaped, options.eps, options.floor)
    return Moments((1 - b1) * direction + b1 * before.momentum @ P.mT, second, escaped)


def lost_mass(second: Tensor, carried: Tensor) -> Tensor:
    """What a change of basis loses of V: the lesser of its largest eigenvalue gap and its trace, (n,)."""
    gap = (torch.linalg.eigvalsh(second) - torch.linalg.eigvalsh(carried)).amax(-1).clamp_min(0)
    trace = (second - carried).diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)
    return torch.minimum(gap, trace)


def inverse_root(second: Tensor, escaped: Tensor, eps: float, floor: float) -> Tensor:
    """(V + rho I)^-1/2, (n, r, r); eigenvalues of V are at least `floor` times the largest."""
    values, vectors = torch.linalg.eigh(second)
    values = torch.maximum(values.clamp_min(0), floor * values[:, -1:].clamp_min(0))
    roots: Tensor = (values + escaped[:, None]).sqrt() + eps
    whitened: Tensor = (vectors / roots[:, None, :]) @ vectors.mT
    return whitened


@dataclass(frozen=True)
class _Half:
    """One side of a stack on its way through a step."""

    stack: Stack
    side: Side
    own: Polar
    partner: Polar
    h: Tensor


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square of each (d, r), (n, 1, 1)."""
    return tensor.square().mean((-2, -1), keepdim=True).sqrt()


class LoRARITE(PairOptimizer):
    """An adaptive optimizer for factor pairs that no change of factors (Q A, B Q^-1) can influence.

    Args:
        params: parameters or groups; the factor pairs arrive by `bind_pairs`.
        lr: learning rate; each row of an update has a root mean square of about lr times the partner's inverse size.
        betas: memory of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: fraction lr * weight_decay by which parameters shrink at each step.
        skip_rms: a factor's gradient counts as zero at a step where, freed of the partner's size, its root mean square
            is above this; null never skips.
        clip_norm: largest norm of those gradients over all layers, and apart from it of the gradients of parameters in
            no pair; null for none. The trainer's own clipping would undo the invariance and is refused.
        cap_rms: largest root mean square of the momentum in a step; null for none.
        floor: least eigenvalue of the second moment over the largest; 0 keeps directions that are rounding noise.
        escaped_mass: make up for what the second moment loses when the factors turn.
    """

    bibtex: ClassVar[str] = """@inproceedings{yen2025lorarite,
  title = {{LoRA} Done {RITE}: Robust Invariant Transformation Equilibration for {LoRA} Optimization},
  author = {Yen, Jui-Nan and Si, Si and Meng, Zhao and Yu, Felix and Duvvuri, Sai Surya and Dhillon, Inderjit S. and
            Hsieh, Cho-Jui and Kumar, Sanjiv},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2410.20625}
}"""

    trains: ClassVar[Literal["any", "both", "B"]] = "both"
    clips_itself: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        skip_rms: float | None = 1.0,
        clip_norm: float | None = 1.0,
        cap_rms: float | None = None,
        floor: float = 1e-7,
        escaped_mass: bool = False,
    ) -> None:
        bounds = {"skip_rms": skip_rms, "clip_norm": clip_norm, "cap_rms": cap_rms}
        settings = {**bounds, "floor": floor, "escaped_mass": escaped_mass}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, settings)
        positive = (lambda v: v is None or v > 0, "it must be above 0, or null for none.")
        fraction = (lambda v: 0 <= v < 1, "it must lie in [0, 1). A ratio of eigenvalues; 1e-7 is usual.")
        check_settings(self, {**dict.fromkeys(bounds, positive), "floor": fraction})

    def take_step(self) -> None:
        """Both sides from the factors before the step; a missing gradient beside a present one counts as zero."""
        found = adam(self, self._clipped_plain())
        halves = [half for stack in stack_pairs(self.with_gradient("A", "B")) for half in self._halves(stack)]
        scale = self._scale([half.h for half in halves])
        states = self._states(halves)
        advanced = [self._advance(half, scale, states) for half in halves]
        for half, moments in zip(halves, advanced, strict=True):
            self._keep(half, moments)
            step = _shard_like(self._capped(moments.momentum) @ half.partner.root_inverse, half.side)
            found |= half.stack.own(step, half.side)
        descend(self, found)

    def _clipped_plain(self) -> dict[Tensor, Tensor]:
        gradients = self.plain_gradients()
        scale = self._scale(list(gradients.values()))
        return {p: local(gradient) * scale.to(gradient.dtype) for p, gradient in gradients.items()}

    def _scale(self, gradients: Sequence[Tensor]) -> Tensor:
        """The factor that brings the norm of all `gradients` to `clip_norm` where it is above."""
        limit = self.defaults["clip_norm"]
        if limit is None or not gradients:
            return torch.ones(())
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        return torch.clamp_max(limit / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1.0)

    def _halves(self, stack: Stack) -> tuple[_Half, _Half]:
        of_A, of_B = polar(stack.A.mT), polar(stack.B)
        h_A, h_B = stack.grad_A.mT @ of_B.root_inverse, stack.grad_B @ of_A.root_inverse
        return _Half(stack, "A", of_A, of_B, self._kept(h_A)), _Half(stack, "B", of_B, of_A, self._kept(h_B))

    def _kept(self, h: Tensor) -> Tensor:
        """Without the sides that are skipped."""
        limit = self.defaults["skip_rms"]
        return h if limit is None else torch.where(rms(h) > limit, 0.0, h)

    def _capped(self, momentum: Tensor) -> Tensor:
        limit = self.defaults["cap_rms"]
        return momentum if limit is None else momentum * (limit / rms(momentum)).clamp_max(1.0)

    def _advance(self, half: _Half, scale: Tensor, states: States) -> Moments:
        """The moments of one side."""
        stack = half.stack
        own = [states[factor] for factor in stack.factors(half.side)]
        before = Moments(
            _shard_like(stack.join([state["momentum"] for state in own]), half.side),
            stack.join([state["second"] for state in own]),
            stack.join([state["escaped"] for state in own], axes=0),
        )
        other: Side = "B" if half.side == "A" else "A"
        basis = _shard_like(stack.join([states[factor]["basis"] for factor in stack.factors(other)]), other)
        t = [state["step"] for state, count in zip(own, stack.counts, strict=True) for _ in range(count)]
        turned = half.partner.basis.mT @ basis
        return advance(half.h * scale, turned, before, torch.tensor(t).to(turned), self._options)

    def _states(self, halves: Sequence[_Half]) -> States:
        """Full states of all factors from the step before, in one collective where they are sharded."""
        states = {factor: self._state(factor, h.side) for h in halves for factor in h.stack.factors(h.side)}
        return dict(zip(states, gather_nested(list(states.values())), strict=True))

    def _state(self, factor: Tensor, side: Side) -> dict[str, Any]:
        """State of a factor, all zero before its first step."""
        state: dict[str, Any] = self.state[factor]
        if "momentum" not in state:
            lead, rank = factor.shape[:-2], factor.shape[-2 if side == "A" else -1]
            state |= {"step": 0, "momentum": torch.zeros_like(factor), "basis": torch.zeros_like(factor)}
            shard = local(factor)
            state |= {"second": shard.new_zeros(*lead, rank, rank), "escaped": shard.new_zeros(lead)}
        return state

    @property
    def _options(self) -> Options:
        return Options(**{name: self.defaults[name] for name in ("betas", "eps", "floor", "escaped_mass")})

    def _keep(self, half: _Half, moments: Moments) -> None:
        factors = half.stack.factors(half.side)
        for name, tall in (("momentum", moments.momentum), ("basis", half.own.basis)):
            for factor, shard in half.stack.own(_shard_like(tall, half.side), half.side).items():
                self.state[factor][name] = as_shard_of(_copy(shard), factor)
        for name, value in (("second", moments.second), ("escaped", moments.escaped)):
            for factor, part in zip(factors, half.stack.split(value, factors), strict=True):
                self.state[factor][name] = _copy(part)
        for factor in factors:
            self.state[factor]["step"] += 1


def _copy(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _shard_like(tall: Tensor, side: Side) -> Tensor:
    """(n, d, r) to and from the layout of its factor: (n, r, d_in) for A, as it is for B."""
    return tall.mT if side == "A" else tall
