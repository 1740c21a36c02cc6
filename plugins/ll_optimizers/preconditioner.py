"""Riemannian preconditioning of factor gradients, batched over pairs and experts.

Zhang and Pilanci, 2024, arXiv:2402.02347; per expert: Sun et al., 2025, arXiv:2502.15828.

    dA = (B^T B + d I)^-1 gA,   dB = gB (A A^T + d I)^-1

    paper  here            shape
    A, B   lora_A, lora_B  (..., r, d_in), (..., d_out, r)
    gA, gB grad_A, grad_B  like A and B
    d      damping         a number

With d = 0 the step does not depend on how the product B A is factorised: (Q A, B Q^-1) gives the same product.

Departs from the paper: a Gram without Cholesky factor gets ten times the damping, which is counted and reported; the
released code falls back to the raw gradient or the identity in silence.
"""

from __future__ import annotations

from torch import Tensor

from lora_lightning.optim.pairs import Factorised, Side, Stack, damped_cholesky, gram_A, gram_B


def precondition(
    grad_A: Tensor, grad_B: Tensor, lora_A: Tensor, lora_B: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """(B^T B + d I)^-1 gA and gB (A A^T + d I)^-1, for one pair or a batch, in the dtype given."""
    of_A, of_B = (Factorised(*damped_cholesky(gram, damping)) for gram in (gram_A(lora_A), gram_B(lora_B)))
    return of_B.solve(grad_A), of_A.solve_right(grad_B)


def direction(stack: Stack, side: Side, partner: Factorised) -> Tensor:
    """The preconditioned gradients of one side of a stack, (n, r, d_in) or (n, d_out, r), or of its shards."""
    partner = partner.at(stack.held(side))
    return partner.solve(stack.grad_A) if side == "A" else partner.solve_right(stack.grad_B)
