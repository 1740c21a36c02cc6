"""Stages and noise in odd orders: stops, skips, merges, loads, other callbacks beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import Plain, fit, loader
from resuming import SaveAt, at_step
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data, trainer

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_lorasc import LoRASC
from ll_lorasc.optim import SlowFast
from ll_optimizers.plus import LoRAPlus
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.adapters.noise import Noise
from lora_lightning.callbacks import Cascade, ExactResume, InjectAdapters, KeepBest, NoiseInjection, ScheduleCallback
from lora_lightning.errors import AdapterStateError, ResumeError, SettingsError
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import LAYERS, seeded
from lora_lightning.training.run_report import RunReport


class Project(Plain):
    def __init__(self):
        with seeded(5):
            super().__init__()
            self.used, self.head = nn.Linear(4, 12), nn.Linear(12, 2)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


class FailAt(StopAt):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step >= self.step:
            raise RuntimeError("stopped")


def inject(method=None, **options):
    return InjectAdapters(method or LoRA(rank=1), ["used"], also_train=["head"], seed=3, **options)


def original():
    return Project().used.weight


@pytest.mark.parametrize("stop", [StopAt(4), StopAt(6)], ids=["at a stage end", "inside a stage"])
def test_a_run_stopped_early_is_folded_and_without_noise(tmp_path, stop):
    module = Project()
    fit(module, tmp_path, [inject(), Cascade(stage_steps=4, noise=0.3), stop], max_steps=12)
    layer = module.used
    assert layer.base_weight.noise is None
    assert not layer.adapter("default").lora_B.any()
    torch.testing.assert_close(layer.weight, layer.merged_weight("default", torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("callback", [Cascade(stage_steps=4, noise=0.3), NoiseInjection(0.3)], ids=["cascade", "noise"])
def test_an_error_leaves_no_noise(tmp_path, callback):
    module = Project()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module, tmp_path, [inject(), callback, FailAt(3)], max_steps=12)
    assert torch.equal(module.used.base.weight, original())


def test_a_step_skipped_at_the_end_is_folded_all_the_same(tmp_path):
    class Skipping(Callback):
        """Makes the last step look like one that a gradient scaler has skipped."""

        phase = 2

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                for callback in trainer.callbacks:
                    if isinstance(callback, ScheduleCallback):
                        callback._finite = False

    module = Project()
    cascade = Cascade(stage_steps=3, noise=0.3)
    fit(module, tmp_path, [inject(), cascade, Skipping()], max_steps=6)
    assert cascade.stage == 2
    assert module.used.base_weight.noise is None


def test_validation_at_a_stage_end_sees_no_noise(tmp_path):
    seen = {}

    class Validated(Project):
        def validation_step(self, batch):
            seen[self.trainer.global_step] = self.used.base_weight.noise is not None

        def val_dataloader(self):
            return loader()

    module = Validated()
    cascade = Cascade(stage_steps=4, noise=0.3)
    fit(module, tmp_path, [inject(), cascade], max_steps=8, val_check_interval=2, limit_val_batches=1)
    assert seen == {2: True, 4: False, 6: True, 8: False}


def test_the_first_stage_starts_on_the_noisy_weight(tmp_path):
    """DoRA's magnitude is the norm of the weight it trains on, so that its first update is zero."""

    class Start(Callback):
        phase = 6

        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 0:
                layer = pl_module.used
                weight = layer.wrapped("default").weight()
                self.same = torch.equal(layer.adapter("default").merged_weight(weight), weight)
                self.noisy = not torch.equal(weight, original())

    start = Start()
    fit(Project(), tmp_path, [inject(DoRA(rank=1)), Cascade(stage_steps=4, noise=0.3), start], max_steps=8)
    assert start.same
    assert start.noisy


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind.startswith("Conv")])
@pytest.mark.parametrize("form", [FactoredUpdate, DenseUpdate])
def test_convolutions_fold_too(kind, form):
    make, x = LAYERS[kind]
    with seeded(1):
        model, x = nn.Sequential(make()).double(), x().double()
    ll.inject(model, LoRA(rank=1), ["0"], also_train=(), seed=0)
    layer = model[0]
    layer.set_folded("default", form(layer.base_layer))
    base = model(x)
    perturb(layer.adapter("default"))
    expected = model(x)
    layer.fold("default")
    layer.adapter("default").reset(torch.Generator())
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(base, expected)


class TestStates:
    @pytest.fixture
    def layer(self):
        with seeded(1):
            model = nn.Sequential(nn.Linear(6, 5)).double()
        ll.inject(model, LoRA(rank=2), ["0"], also_train=(), seed=0)
        perturb(model[0].adapter("default"))
        return model, model[0], model[0].base.weight.clone()

    def test_noise_is_in_no_merge_and_no_ejected_layer(self, layer):
        model, layer, start = layer
        update = layer.merged_weight("default", torch.float64) - start
        layer.set_noise(Noise(0, 0, "0", 0.5))
        ll.merge(model)
        torch.testing.assert_close(layer.base.weight, start + update)
        ll.unmerge(model)
        assert not torch.equal(layer.base.weight, start)
        twin = copy.deepcopy(model)
        ll.eject(model)
        assert torch.equal(model[0].weight, start)
        ll.merge(twin, keep_original=False)
        ll.eject(twin)
        torch.testing.assert_close(twin[0].weight, start + update)

    def test_nothing_changes_underneath_a_merge(self, layer):
        model, layer, _ = layer
        ll.merge(model)
        for change in (
            lambda: layer.set_folded("default", DenseUpdate(layer.base_layer)),
            lambda: layer.set_noise(Noise(0, 0, "0", 0.5)),
            lambda: model.load_state_dict(model.state_dict()),
        ):
            with pytest.raises(AdapterStateError, match="default is merged; call unmerge first"):
                change()

    @pytest.mark.parametrize("form", [FactoredUpdate, DenseUpdate])
    def test_state_dictionaries_hold_the_original_and_load_anywhere(self, layer, form):
        model, layer, start = layer
        fresh = copy.deepcopy(model)
        layer.set_folded("default", form(layer.base_layer))
        layer.fold("default")
        layer.set_noise(Noise(0, 0, "0", 0.5))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        assert torch.equal(state["0.base.weight"], start)
        fresh.load_state_dict(state)
        layer.set_noise(None)
        assert torch.equal(fresh[0].weight, layer.weight)
        assert torch.equal(fresh[0].original_weight(), start)
        model.load_state_dict(state)
        assert torch.equal(model[0].weight, fresh[0].weight)

    def test_a_merged_layers_state_is_its_original_too(self, layer):
        model, _, start = layer
        ll.merge(model)
        assert torch.equal(model.state_dict()["0.base.weight"], start)

    def test_noise_does_not_join_factors(self, layer):
        _, layer, _ = layer
        layer.set_folded("default", FactoredUpdate(layer.base_layer))
        layer.set_noise(Noise(0, 0, "0", 0.5))
        with pytest.raises(AdapterStateError, match="noise has no factors to fold"):
            layer.fold("default", keep_noise=True)


def test_the_projects_adapter_is_written_after_everything_else(tmp_path):
    module = Project()
    callbacks = [inject(directory=tmp_path / "adapter"), Cascade(stage_steps=4, blend=0.5, noise=0.3), StopAt(6)]
    fit(module, tmp_path, callbacks, max_steps=12)
    fresh = Project()
    ll.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.used.weight, module.used.weight)


def test_a_checkpoint_is_not_loaded_into_merged_layers(tmp_path):
    module, saved = Project(), tmp_path / "saved.ckpt"
    fit(module, tmp_path, [inject(), ExactResume(), SaveAt(saved, at_step(4))], max_steps=6)
    ll.merge(module)
    with pytest.raises(AdapterStateError, match="is merged; call unmerge first"):
        trainer(tmp_path, [inject(), ExactResume()], max_steps=6).fit(module, loader(), ckpt_path=saved)


def test_other_stages_on_resume_are_refused(tmp_path):
    saved = tmp_path / "saved.ckpt"
    fit(Project(), tmp_path, [inject(), Cascade(stage_steps=4), SaveAt(saved, at_step(8))], max_steps=10)
    again = trainer(tmp_path, [inject(), Cascade(stage_steps=5)], max_steps=10)
    with pytest.raises(ResumeError, match=r"Cascade\.stage_steps is 5; the run was started with 4"):
        again.fit(Project(), loader(), ckpt_path=saved, weights_only=True)


def test_two_adapters_on_a_layer_share_one_noise(tmp_path):
    """With blend 1 and noise that persists, nothing jumps at the end of a stage, whatever the number of adapters."""
    module = Project().double()
    seen = {}

    class Effective(Callback):
        def __init__(self, phase):
            self.phase = phase

        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[self.phase, trainer.global_step] = pl_module.used.weight.clone()

    class Double(Project):
        def training_step(self, batch):
            return super().training_step([batch[0].double(), batch[1]])

    module = Double().double()
    ll.inject(module, LoRA(rank=1), ["used"], also_train=["head"], name="one", seed=1)
    ll.inject(module, LoRA(rank=1), ["used"], also_train=(), name="two", seed=2)
    ll.set_active(module, ["one", "two"])
    ll.set_trainable(module, ["one", "two"])
    fit(module, tmp_path, [Cascade(stage_steps=3, noise=0.3, noise_mode="persist"), Effective(4), Effective(6)])
    torch.testing.assert_close(seen[6, 3], seen[4, 3], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


@pytest.mark.parametrize(
    "extra",
    [lambda: [NoiseInjection(0.3)], lambda: [Cascade(stage_steps=4, blend=0.5), StopAt(6)]],
    ids=["noise", "cut"],
)
def test_the_numbers_told_are_those_of_the_state_that_is_written(encoder, tmp_path, extra):
    module, data = classification(encoder, LoRA(rank=1)), labelled_data(encoder)
    report = RunReport(tmp_path)
    trainer(tmp_path, [report, *extra()], max_steps=8, val_check_interval=2).fit(module, datamodule=data)
    values = trainer(tmp_path, []).validate(module, datamodule=data, verbose=False)[0]
    assert report.summary["values"]["loss"] == pytest.approx(values["val_loss"], abs=1e-6)
    assert all(distance > 0 for distance in report.summary["changed"].values())


def test_keep_best_takes_a_state_at_a_stage_end(tmp_path):
    class Scored(Project):
        def validation_step(self, batch):
            self.log("score", {4: 0.9, 8: 0.5}.get(self.trainer.global_step, float("nan")))

        def val_dataloader(self):
            return loader()

    best, after = KeepBest("score"), {}

    class After(Callback):
        phase = 6

        def on_train_batch_end(self, trainer, pl_module, *_):
            after[trainer.global_step] = pl_module.used.weight.clone()

    module = Scored()
    callbacks = [inject(), Cascade(stage_steps=4), best, After()]
    fit(module, tmp_path, callbacks, max_steps=12, val_check_interval=2, limit_val_batches=1)
    assert best.step == 4
    assert torch.equal(module.used.weight, after[4])


def test_settings_that_make_no_sense(tmp_path, encoder):
    with pytest.raises(SettingsError, match="stages inside stages"):
        LoRASC(inner=LoRASC(inner=LoRA()))
    with pytest.raises(SettingsError, match=r"stage_steps is 2\.5; it must be a whole number"):
        LoRASC(inner=LoRA(), stage_steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="it must be a method with its settings"):
        LoRASC(inner="LoRA")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r'overrides\["used"\]: LoRASC\.blend holds for the whole run'):
        ll.inject(Project(), LoRASC(inner=LoRA()), ["used"], overrides={"used": {"blend": 1.0}}, also_train=())
    module = classification(encoder, LoRASC(inner=LoRA(rank=1), stage_steps=4, lr="rewarm"))
    endless = trainer(tmp_path, [], max_steps=-1, max_time="00:00:10:00")
    with pytest.raises(SettingsError, match="nothing bounds the run"):
        endless.fit(module, datamodule=labelled_data(encoder))


class Factors(Callback):
    """Value, optimizer state and rate of the adapter's parameters after each step and what acts on it."""

    phase = 6

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        optimizer = trainer.optimizers[0]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.seen[trainer.global_step] = [
            (p.detach().clone(), copy.deepcopy(dict(optimizer.state.get(p, {}))), rates[id(p)])
            for p in pl_module.used.adapter("default").parameters()
        ]


def slow_fast(groups):
    return SlowFast(groups, lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9), blend=0.3, every_n_steps=3)


@pytest.mark.parametrize("moments", ["reset", "keep"])
@pytest.mark.parametrize(
    "factory", [slow_fast, lambda groups: LoRAPlus(groups, 2.0, slow_fast)], ids=["alone", "inside"]
)
def test_slow_weights_of_one_stage_never_reach_the_next(tmp_path, moments, factory):
    """The first blend of stage 2, at step 6, runs from where that stage started, also where momentum is kept."""

    class Blended(Project):
        def configure_optimizers(self):
            return build_optimizer(self, factory)

    factors = Factors()
    fit(Blended(), tmp_path, [inject(), Cascade(stage_steps=4, moments=moments), factors], max_steps=8)
    for end, before, after in zip(factors.seen[4], factors.seen[5], factors.seen[6], strict=True):
        assert list(end[1]) == (["momentum_buffer"] if moments == "keep" else [])
        fast = before[0] - after[2] * after[1]["momentum_buffer"]
        assert not torch.equal(fast, before[0])
        torch.testing.assert_close(after[0], end[0] + 0.3 * (fast - end[0]))


def test_a_slow_fast_inside_another_is_refused():
    groups = [nn.Parameter(torch.ones(1))]
    with pytest.raises(SettingsError, match=r"SlowFast\.inner holds a SlowFast already"):
        SlowFast(groups, lambda g: LoRAPlus(g, inner=SlowFast))


def test_slow_fast_tells_its_settings():
    parameter = nn.Parameter(torch.ones(1))
    assert SlowFast([parameter], blend=0.3).defaults["blend"] == 0.3
    assert SlowFast([parameter]).defaults["inner"] == "AdamW"
