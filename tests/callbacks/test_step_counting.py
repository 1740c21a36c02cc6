"""Optimizer steps: who counts them, what a moment means, which ramps fit, what is announced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback
from projects import Plain, fit, loader
from toy_runs import trainer

from lora_lightning.callbacks import StepCallback
from lora_lightning.callbacks.step_counting import announce, resolve_ramp, resolve_step
from lora_lightning.errors import SettingsError


class Recorder(StepCallback):
    phase = 4

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer, pl_module, step):
        assert step == trainer.global_step == self.last_step
        self.steps.append(step)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_acts_once_a_step_however_many_batches_it_takes(tmp_path, accumulate):
    recorder = Recorder()
    fit(Plain(), tmp_path, [recorder], accumulate_grad_batches=accumulate, max_steps=4, max_epochs=-1)
    assert recorder.steps == [1, 2, 3, 4]
    assert recorder.batches > 4 * accumulate - accumulate


def test_a_second_fit_goes_on_counting_where_the_first_ended(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, [recorder], max_steps=2)
    run.fit(Plain(), loader())
    run.fit_loop.epoch_loop.max_steps = 4
    run.fit(Plain(), loader())
    assert recorder.steps == [1, 2, 3, 4]


def test_its_place_is_that_of_its_phase(tmp_path):
    first, second, none = Recorder(), Recorder(), Callback()
    first.phase = 2
    run = fit(Plain(), tmp_path, [second, first, none], max_steps=1)
    order = [callback for callback in run.callbacks if callback in (first, second, none)]
    assert order == [none, first, second]


def test_what_is_acted_on_is_named_without_wrappers(capsys):
    announce(SimpleNamespace(is_global_zero=True), Recorder(), "acts on", "adapter", ["a._fsdp_wrapped_module.b", "c"])
    announce(SimpleNamespace(is_global_zero=False), Recorder(), "acts on", "adapter", ["a"])
    assert capsys.readouterr().out == "Recorder: acts on 2 adapters (a.b, ...)\n"


@pytest.mark.parametrize(("value", "total", "step"), [(0.1, 400, 40), (1.0, 50, 50), (7, 50, 7), (0.0, 50, 0)])
def test_moments_as_fractions_and_step_numbers(value, total, step):
    assert resolve_step(value, total, "x") == step


@pytest.mark.parametrize(
    ("start", "end", "total", "message"),
    [
        (0.8, 0.1, 400, r"S.start is 0.8 and end is 0.1; the schedule must start before it ends"),
        (30, 20, 400, r"S.start is 30 and end is 20; the schedule must start before it ends"),
        (
            0.1,
            0.8,
            3,
            r"from step 2 to step 2 in a run of 3 steps, so it does not fit; the smallest run that fits has 4",
        ),
        (2, 90, 50, r"S.end is step 90; the run has 50 steps, so it must be at most 50"),
        (0.1, 0.8, None, r"S.start is 0.1, a fraction of all steps, but nothing bounds their number; set max_steps"),
        (0.1, 8.5, 100, r"S.end is 8.5; above 1 it is a step number and must be whole, such as 8"),
    ],
)
def test_schedules_that_do_not_fit(start, end, total, message):
    with pytest.raises(SettingsError, match=message):
        resolve_ramp(start, end, total, "S")


def test_a_ramp_never_starts_before_step_two():
    assert resolve_ramp(0.0, 1.0, 10, "S") == (2, 10)
    assert resolve_ramp(0.1, 0.8, 12, "S") == (2, 10)


def test_the_smallest_run_named_is_the_smallest_that_fits():
    for total in range(1, 4):
        with pytest.raises(SettingsError, match="smallest run that fits has 4 optimizer steps"):
            resolve_ramp(0.1, 0.8, total, "S")
    assert resolve_ramp(0.1, 0.8, 4, "S") == (2, 3)
