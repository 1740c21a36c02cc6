"""The clock: when schedules act, on what, and what happens when they cannot."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from projects import Plain, fit, loader
from toy_runs import trainer

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.callbacks import InjectAdapters, RankPruning, ScheduleCallback, SparsitySchedule, TrainingGuard
from lora_lightning.errors import NoEffectError


class Recorder(ScheduleCallback):
    phase, requires = 1, "anything"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def accepts(self, adapter):
        return True

    def on_gradients(self, step, adapters):
        self.events.append(("gradients", step))

    def on_stepped(self, step, adapters):
        self.events.append(("stepped", step))

    def on_skipped(self, step):
        self.events.append(("skipped", step))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_acts_once_an_optimizer_step_at_both_moments(tmp_path, accumulate):
    recorder = Recorder()
    fit(
        Plain(),
        tmp_path,
        [InjectAdapters(LoRA(rank=2), ["used"]), recorder],
        accumulate_grad_batches=accumulate,
        max_steps=4,
    )
    assert recorder.events == [(moment, step) for step in range(1, 5) for moment in ("gradients", "stepped")]


def test_gradients_are_seen_unclipped_and_weights_not_yet_moved(tmp_path):
    seen = {}

    class Look(Recorder):
        def on_gradients(self, step, adapters):
            adapter = next(iter(adapters.values()))
            if step == 1:
                seen["grad"] = adapter.lora_B.grad.clone()
                seen["before"] = adapter.lora_B.detach().clone()

        def on_stepped(self, step, adapters):
            adapter = next(iter(adapters.values()))
            if step == 1:
                seen["clipped"], seen["after"] = adapter.lora_B.grad.clone(), adapter.lora_B.detach().clone()

    fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"]), Look()], gradient_clip_val=1e-4, max_steps=1)
    assert seen["grad"].norm() > 1e-4 >= seen["clipped"].norm() * 0.999
    assert not seen["before"].any()
    assert seen["after"].any()


def test_schedules_come_before_checkpoints_and_in_the_order_of_phases(tmp_path):
    guard, sparse = TrainingGuard(), SparsitySchedule(start=2, end=4)
    given = [
        ModelCheckpoint(tmp_path, every_n_train_steps=1),
        guard,
        sparse,
        InjectAdapters(RoseLoRA(rank=2), ["used"]),
    ]
    run = fit(Plain(), tmp_path, given, enable_checkpointing=True, max_steps=5)
    order = [type(callback).__name__ for callback in run.callbacks]
    assert order[-1] == "ModelCheckpoint"
    assert order.index("SparsitySchedule") < order.index("TrainingGuard") < order.index("ModelCheckpoint")


def test_nothing_to_act_on_is_an_error(tmp_path):
    with pytest.raises(
        NoEffectError, match=r"SparsitySchedule found nothing to act on: .*entry masks .*1 trainable adapters"
    ):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"]), SparsitySchedule()])
    with pytest.raises(NoEffectError, match=r"RankPruning .*rank mask .*0 trainable adapters"):
        fit(Plain(), tmp_path, [RankPruning(1)])


def test_a_step_skipped_by_a_gradient_scaler_leaves_the_schedule_alone(tmp_path):
    recorder = Recorder()

    class Overflow(Plain):
        def training_step(self, batch):
            return super().training_step(batch) * (float("inf") if self.global_step == 1 else 1.0)

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    callbacks = [InjectAdapters(LoRA(rank=2), ["used"]), recorder, TrainingGuard()]
    fit(Overflow(), tmp_path, callbacks, plugins=[scaled], max_steps=3)
    first, third = ([(moment, step) for moment in ("gradients", "stepped")] for step in (1, 3))
    assert recorder.events == [*first, ("skipped", 2), *third]


def test_gradients_are_read_unscaled(tmp_path):
    class Reader(Recorder):
        def on_gradients(self, step, adapters):
            (adapter,) = adapters.values()
            self.events.append(adapter.lora_B.grad.clone())

    seen = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        reader = Reader()
        scaler = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))] if scale else []
        options = {"precision": "32-true"} if scale is None else {"plugins": scaler}
        with torch.autocast("cpu", enabled=False):
            fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], seed=0), reader], max_steps=3, **options)
        seen.append([event for event in reader.events if isinstance(event, torch.Tensor)])
    assert len(seen[0]) == 3
    for one, other in zip(*seen, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(
            other, one, rtol=2e-2, atol=1e-4
        )  # float16 in between; scaled they are 1,024 times that


def test_a_method_s_callback_is_added_once_over_two_fits(tmp_path):
    run = trainer(tmp_path, [InjectAdapters(RoseLoRA(rank=2, start=2, end=4), ["used"])], max_steps=5)
    run.fit(Plain(), loader())
    run.fit_loop.epoch_loop.max_steps = 10
    run.fit(Plain(), loader())
    assert sum(isinstance(callback, SparsitySchedule) for callback in run.callbacks) == 1
