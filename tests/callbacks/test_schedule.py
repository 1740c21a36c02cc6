"""The clock: when schedules act, on what, and what happens when they cannot."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from projects import Plain, fit, loader
from toy_runs import trainer

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.callbacks import InjectAdapters, RankPruning, ScheduleCallback, SparsitySchedule, TrainingGuard
from lora_lightning.callbacks.steps import announce, resolve_ramp, resolve_step
from lora_lightning.errors import NoEffectError, SettingsError
from lora_lightning.injection.records import trainable_adapters


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


def test_a_checkpoint_of_a_step_holds_the_pruned_factors(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    method = RoseLoRA(rank=2, sparsity=0.5, start=2, end=4)
    fit(Plain(), tmp_path, [InjectAdapters(method, ["used"]), checkpoint], enable_checkpointing=True, max_steps=5)
    tensors = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["lora_lightning"]["tensors"]
    assert (tensors["used.adapters.default.lora_A"] == 0).sum(1).tolist() == [2, 2]


def test_what_is_acted_on_is_named_without_wrappers(capsys):
    announce(SimpleNamespace(is_global_zero=True), Recorder(), "acts on", "adapter", ["a._fsdp_wrapped_module.b", "c"])
    announce(SimpleNamespace(is_global_zero=False), Recorder(), "acts on", "adapter", ["a"])
    assert capsys.readouterr().out == "Recorder: acts on 2 adapters (a.b, ...)\n"


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
    moments = ("gradients", "stepped")
    assert recorder.events == [(moment, step) for step in (1, 3) for moment in moments]


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


def test_rank_pruning_reaches_its_rank_and_removed_components_stay_out(tmp_path):
    masks = []

    class Look(Callback):
        phase = 8

        def on_train_batch_end(self, trainer, pl_module, *args):
            adapter = next(iter(trainable_adapters(pl_module).values()))
            masks.append(adapter.rank_mask.clone())

    module = Plain()
    fit(module, tmp_path, [InjectAdapters(LoRA(rank=4), ["used"]), RankPruning(2, start=2, end=6), Look()], max_steps=8)
    assert [int(mask.sum()) for mask in masks][:2] == [4, 4]
    assert [int(mask.sum()) for mask in masks][5:] == [2, 2, 2]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    adapter = next(iter(trainable_adapters(module).values()))
    A, B = adapter.low_rank()
    assert A.shape == (2, 4)
    torch.testing.assert_close(B @ A, adapter.merged_weight(torch.zeros(4, 4)).detach())


def test_rank_pruning_refuses_a_rank_above_the_adapters(tmp_path):
    with pytest.raises(SettingsError, match=r"RankPruning.final_rank is 5; used.* has rank 2"):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"]), RankPruning(5, start=2, end=4)])


def test_a_method_s_callback_is_added_once_over_two_fits(tmp_path):
    run = trainer(tmp_path, [InjectAdapters(RoseLoRA(rank=2, start=2, end=4), ["used"])], max_steps=5)
    run.fit(Plain(), loader())
    run.fit_loop.epoch_loop.max_steps = 10
    run.fit(Plain(), loader())
    assert sum(isinstance(callback, SparsitySchedule) for callback in run.callbacks) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep_rule": "flor"},
            r"SparsitySchedule.keep_rule is 'flor'; it must be \"floor\" or \"ceil\" or \"official\"",
        ),
        ({"first_score": "one"}, r"SparsitySchedule.first_score is 'one'; it must be \"zero\" or \"gradient\""),
        ({"clamp": -1.0}, r"SparsitySchedule.clamp is -1.0; it must be above 0, or null"),
        ({"sparsity": 1.0}, r"SparsitySchedule.sparsity is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        SparsitySchedule(**settings)
