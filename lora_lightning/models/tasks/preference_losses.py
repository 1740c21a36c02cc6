"""Losses on preferences, as functions of log-probabilities: one number an example.

    dpo      -(1 - e) log s(b d) - e log s(-b d)        d = chosen - rejected, of log-ratios to the reference
    ipo      (d - 1 / (2 b))^2                          the same d
    simpo    -(1 - e) log s(z) - e log s(-z)            z = b d - g, d of mean log-probabilities
    orpo     -b log s(o(chosen) - o(rejected))          o(x) = x - log(1 - exp x), of mean log-probabilities
    kto      w (1 - s(b (r - k)))                       desirable; k - r for undesirable ones

s is the logistic function, b `beta`, e `label_smoothing`, g `gamma`.

dpo: Rafailov et al., 2023, arXiv:2305.18290, eq. 7; with label smoothing: Mitchell, 2023, "A note on DPO with noisy
preferences", eq. 3. ipo: Azar et al., 2023, arXiv:2310.12036, eq. 17. simpo: Meng et al., 2024, arXiv:2405.14734,
eq. 6. orpo: Hong et al., 2024, arXiv:2403.07691, eq. 4 and 7, without the likelihood of the chosen completion that
eq. 6 adds. kto: Ethayarajh et al., 2024, arXiv:2402.01306, eq. 8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log s(margin), with the labels turned round with that probability."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Of log-ratios to the reference."""
    return logistic(beta * (chosen - rejected), label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Of log-ratios to the reference; beta is the paper's tau."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """Of mean log-probabilities."""
    return logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def odds_ratio(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Of mean log-probabilities; beta is the paper's lambda."""
    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)); a probability that rounds to 1 counts as the one below it, without gradient."""
    x = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    # log(1 - exp x): each form where it is exact
    small = x < -0.6931471805599453
    rest = torch.where(small, torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))
    return x - rest


def kto(ratio: Tensor, desirable: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """Of log-ratios to the reference.

    Args:
        ratio: (rows,).
        desirable: whether each completion is, (rows,).
        kl: how far the model is from the reference on prompts with other completions, a scalar without gradient.
        beta: steepness.
        weights: of desirable and of undesirable completions.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    weight = torch.where(desirable, *weights).to(ratio.dtype)
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - kl)))
