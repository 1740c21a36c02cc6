"""The range test: the rate that a curve of losses means, ratios of groups, and a run that is as if it had not been."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.range_test import _ratios_kept, scale_rates, suggestion, unsmoothed


def test_half_of_the_rate_of_the_lowest_loss():
    rates = [10 ** (-5 + step / 10) for step in range(40)]
    losses = [(math.log10(rate) + 3.0) ** 2 for rate in rates]  # lowest at 1e-3
    assert suggestion(rates, losses) == pytest.approx(5e-4)


def test_rates_from_which_losses_are_not_finite_are_left_out():
    rates = [10 ** (-5 + step / 10) for step in range(40)]
    losses = [1.0 - 0.01 * step if step < 21 else math.nan if step % 2 else -100.0 for step in range(40)]
    assert suggestion(rates, losses) == pytest.approx(0.5 * 10 ** (-5 + 18 / 10), rel=0.05)
    assert suggestion(rates, [math.nan] * 40) is None
    assert suggestion(rates[:4], losses[:4]) is None


def test_losses_as_they_were_before_lightning_smoothed_them():
    from lightning.pytorch.tuner.lr_finder import _LRCallback

    generator = torch.Generator().manual_seed(0)
    given = (torch.rand(30, generator=generator) * 3).tolist()
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(batch_idx=0), accumulate_grad_batches=1, global_step=0, should_stop=False,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    callback = _LRCallback(30, None)
    for step, loss in enumerate(given, start=1):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss, dtype=torch.float64)}, None, 0)
    assert unsmoothed(callback.losses) == pytest.approx(given, rel=1e-9)


def test_groups_step_at_their_own_ratio_and_have_one_rate_between_steps():
    one, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = SGD([{"params": [one]}, {"params": [other], "lr": 0.3}], lr=0.1)
    with _ratios_kept([optimizer]):
        for group in optimizer.param_groups:  # as the finder does
            group["lr"] = 1.0
        one.grad, other.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.0, 1.0])
    assert (one.item(), other.item()) == pytest.approx((-1.0, -3.0))
    optimizer.step()  # the hooks are gone
    assert (one.item(), other.item()) == pytest.approx((-2.0, -4.0))


def test_rates_as_if_optimizer_and_schedule_had_been_made_with_them():
    def made(rate):
        optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, WarmUp(warmup_fraction=0.5).schedule(optimizer, 10)

    (optimizer, schedule), (expected, their_schedule) = made(1e-3), made(3e-3)
    scale_rates(
        SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)]), 3.0
    )
    assert optimizer.defaults["lr"] == expected.defaults["lr"]
    assert isinstance(schedule, LambdaLR)
    for _ in range(10):
        assert schedule.get_last_lr() == pytest.approx(their_schedule.get_last_lr())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected.param_groups[0]["lr"])
        for one in (optimizer, expected, schedule, their_schedule):
            one.step()
