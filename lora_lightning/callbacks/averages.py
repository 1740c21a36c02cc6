"""Averages of weights leave what does not train as it is, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor


def keep_equal_means(callbacks: Iterable[Callback]) -> None:
    """Let callbacks of averages give equal numbers as their own mean.

    decay * w + (1 - decay) * w is w up to rounding only. Base weights that move by it are other weights to an adapter
    file, which then fits no base model.

    Args:
        callbacks: those of a run, after they have been set up.
    """
    for callback in callbacks:
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        mean = getattr(average, "avg_fn", None)
        if average is not None and mean is not None and not hasattr(mean, "keeps_equal"):
            average.avg_fn = _keeping_equal(mean)


def _keeping_equal(mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(mean)
    def exact(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        return torch.where(averaged == current, current, mean(averaged, current, count))

    exact.keeps_equal = True  # type: ignore[attr-defined]
    return exact
