"""Cascade and NoiseInjection, in a LightningModule of its own, against stages computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import Watch, Wide, fit, loader
from resuming import SaveAt, at_step
from torch import nn
from toy_runs import trainer

import lora_lightning as ll
from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.adapters.low_rank import LowRankAdapter
from lora_lightning.callbacks import Cascade, ExactResume, InjectAdapters, NoiseInjection
from lora_lightning.errors import SettingsError
from lora_lightning.seeds import generator

ALPHA = 0.4


def run(tmp_path, cascade, method=None, module=None, extra=(), **options):
    module = Wide() if module is None else module
    before, after = Watch(4), Watch(6)
    inject = InjectAdapters(method or LoRA(rank=1, alpha=1.0), ["used"], also_train=["head"], seed=3)
    fit(module, tmp_path, [inject, cascade, before, after, *extra], **{"max_steps": 6, **options})
    return module, before, after


def test_a_plain_cascade_does_not_jump(tmp_path):
    """Blend 1 without noise: just before and just after the end of a stage the function is the same."""
    module, before, after = run(tmp_path, Cascade(stage_steps=3))
    for step in (3, 6):
        torch.testing.assert_close(after.seen[step], before.seen[step], rtol=0, atol=1e-12)
    assert isinstance(module.used.shifts["default"], FactoredUpdate)
    assert not module.used.adapter("default").lora_B.any()
    assert not module.used.rewritten


@pytest.mark.parametrize("rule", ["outer_step", "figure_ema"])
@pytest.mark.parametrize("dense", [False, True])
def test_stages_follow_the_recursion(tmp_path, rule, dense):
    """W_t = W_t-1 + S_t, with F_t read off just before each stage ends; rank at most t r."""
    module = Wide()
    start = module.used.weight.detach().clone()
    method = LoRA(rank=2 if dense else 1, alpha=1.0)  # two stages of rank 2: as many numbers as the weight and more
    cascade = Cascade(stage_steps=2, blend=ALPHA, rule=rule)
    module, before, after = run(tmp_path, cascade, method, module, max_steps=4)
    assert isinstance(module.used.shifts["default"], DenseUpdate if dense else FactoredUpdate)
    weight, slow = start, torch.zeros_like(start)
    for step in (2, 4):
        fast = before.seen[step] - weight
        slow = ALPHA * fast + ((1 - ALPHA) * slow if rule == "figure_ema" else 0)
        weight = weight + slow
        torch.testing.assert_close(after.seen[step], weight, rtol=0, atol=1e-12)
    rank = torch.linalg.matrix_rank(weight - start, rtol=1e-9)
    assert int(rank) == min(2 * method.rank, 4)
    assert torch.equal(module.unused.weight, Wide().unused.weight)
    ll.eject(module)
    assert torch.equal(module.used.weight, start)


def test_a_last_stage_that_is_cut_short_is_folded(tmp_path):
    module, before, after = run(tmp_path, Cascade(stage_steps=4), max_steps=6)
    assert not module.used.adapter("default").lora_B.any()
    torch.testing.assert_close(after.seen[6], before.seen[6], rtol=0, atol=1e-12)
    assert module.used.low_rank("default")[0].shape[0] == 2


def test_adapters_are_told_of_each_stage_that_begins_after_they_were_reset(tmp_path, monkeypatch):
    told = []

    def begin_stage(adapter, stage):
        told.append((stage, bool(adapter.lora_B.any())))

    monkeypatch.setattr(LowRankAdapter, "begin_stage", begin_stage)
    run(tmp_path, Cascade(stage_steps=2), max_steps=6)
    assert told == [(1, False), (2, False), (3, False)]


def test_a_stage_is_an_epoch_unless_told_otherwise(tmp_path):
    cascade = Cascade()
    module, _, _ = run(tmp_path, cascade, max_steps=-1, max_epochs=2, accumulate_grad_batches=3)
    assert cascade.length == math.ceil(8 / 3)
    assert cascade.stage == 2
    assert module.used.low_rank("default")[0].shape[0] == 2


def test_optimizer_state_is_forgotten_and_parameters_stay_the_same_objects(tmp_path):
    module = Wide(momentum=0.9)
    seen = []

    class Identity(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([id(p) for p in pl_module.used.adapter("default").parameters()])

    _, before, after = run(tmp_path, Cascade(stage_steps=3), module=module, extra=[Identity()])
    assert before.states[3] == [1, 1]
    assert after.states[3] == [0, 0]
    assert before.states[4] == [1, 1]
    assert all(ids == seen[0] for ids in seen)
    _, _, after = run(tmp_path, Cascade(stage_steps=3, moments="keep"), module=Wide(momentum=0.9))
    assert after.states[3] == [1, 1]


def test_one_stage_of_blend_one_without_noise_is_plain_training(tmp_path):
    """Step for step what LoRA does alone."""
    _, cascaded, _ = run(tmp_path, Cascade(stage_steps=6))
    plain = Watch(4)
    module = Wide()
    inject = InjectAdapters(LoRA(rank=1, alpha=1.0), ["used"], also_train=["head"], seed=3)
    fit(module, tmp_path, [inject, plain], max_steps=6)
    assert all(torch.equal(cascaded.seen[step], plain.seen[step]) for step in range(1, 7))


@pytest.mark.parametrize("mode", ["restore", "persist"])
def test_noise_of_a_stage(tmp_path, mode):
    """restore: what a stage adds is S_t; persist: S_t and the stage's noise."""
    module = Wide()
    start = module.used.weight.detach().clone()
    seen = {}

    class Noises(Callback):
        phase = 4

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            layer = pl_module.used
            base = layer.wrapped("default").weight()
            seen[trainer.global_step] = (base.clone(), layer.clean_weight("default").clone(), layer.weight.clone())

    cascade = Cascade(stage_steps=3, blend=ALPHA, noise=0.2, noise_mode=mode)
    _, _, after = run(tmp_path, cascade, module=module, extra=[Noises()], max_steps=6)
    for step in (3, 6):
        noisy, clean, trained = seen[step]
        noise = noisy - clean
        bound = 0.2 * float(clean.std()) / 2
        assert 0 < float(noise.abs().max()) <= bound * (1 + 1e-9)
        expected = clean + ALPHA * (trained - noisy) + (noise if mode == "persist" else 0)
        if step == 6:
            torch.testing.assert_close(after.seen[step], expected, rtol=0, atol=1e-12)
        else:
            torch.testing.assert_close(seen[4][1], expected, rtol=0, atol=1e-12)
    assert torch.equal(module.used.original_weight(), start)
    assert module.used.rewritten == (mode == "persist")
    ll.eject(module)
    assert torch.equal(module.used.weight, start)


def test_noise_is_relative_to_the_deviation_of_the_weight_of_each_stage(tmp_path):
    """U[-1/2, 1/2] times strength times the deviation, with n - 1, of the weight of the stage, without noise."""
    sizes = {}

    class Sizes(Callback):
        phase = 4

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weight = pl_module.used.clean_weight("default").flatten()
            deviation = math.sqrt(float(((weight - weight.sum() / 48) ** 2).sum()) / 47)
            noise = pl_module.used.wrapped("default").weight() - pl_module.used.clean_weight("default")
            sizes[trainer.global_step] = noise / (0.2 * deviation), deviation

    run(tmp_path, Cascade(stage_steps=3, noise=0.2), LoRA(rank=1, alpha=9.0), extra=[Sizes()])
    assert sizes[1][1] == pytest.approx(sizes[3][1], rel=1e-12)
    assert abs(sizes[4][1] / sizes[3][1] - 1) > 1e-4  # the second stage measures what the first has left
    for stage, step in enumerate((1, 4)):
        uniform = torch.rand(12, 4, generator=generator(3, "noise", stage, "used")) - 0.5
        torch.testing.assert_close(sizes[step][0], uniform.double(), rtol=0, atol=1e-9)


def test_one_stage_that_shrinks_its_update_is_said(tmp_path, caplog):
    run(tmp_path, Cascade(stage_steps=6, blend=0.5))
    assert "Cascade: one stage only; blend=0.5 shrinks its update by that." in caplog.text
    caplog.clear()
    run(tmp_path, Cascade(stage_steps=3, blend=0.5))
    assert "one stage only" not in caplog.text


def test_noise_differs_by_stage_and_not_by_run(tmp_path):
    def bases():
        seen = {}

        class Bases(Callback):
            phase = 4

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                layer = pl_module.used
                seen[trainer.global_step] = layer.wrapped("default").weight() - layer.clean_weight("default")

        run(tmp_path, Cascade(stage_steps=3, noise=0.2), extra=[Bases()])
        return seen

    one, other = bases(), bases()
    assert all(torch.equal(one[step], other[step]) for step in one)
    assert torch.equal(one[1], one[3])
    assert not torch.allclose(one[3], one[4])


def test_a_constant_weight_gets_no_noise(tmp_path):
    module = Wide()
    nn.init.constant_(module.used.weight, 0.5)
    run(tmp_path, Cascade(stage_steps=3, noise=0.2), module=module)
    assert torch.equal(module.used.original_weight(), torch.full((12, 4), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"blend": 0.0}, r"Cascade\.blend is 0\.0; it must lie in \(0, 1\]"),
        ({"stage_steps": 1}, r"stage_steps is 1; it must be at least 2"),
        ({"stage_steps": 3, "stage_epochs": 1}, r"stage_epochs is 1 too; give one of them"),
        ({"stage_epochs": 0}, r"stage_epochs is 0; it must be a whole number of at least 1"),
        ({"noise": -1.0}, r"noise is -1\.0; it must be at least 0"),
        ({"rule": "ema"}, r"rule is 'ema'; it must be \"outer_step\" or \"figure_ema\""),
        ({"rewarm_steps": 0}, r"rewarm_steps is 0"),
    ],
)
def test_settings_outside_their_rules(options, text):
    with pytest.raises(SettingsError, match=text):
        Cascade(**options)


def test_what_does_not_go_together_is_refused_before_training(tmp_path):
    with pytest.raises(SettingsError, match="brings back what SparsitySchedule has removed"):
        run(tmp_path, Cascade(stage_steps=3), RoseLoRA(rank=1, start=2, end=4))
    with pytest.raises(SettingsError, match="trains a bias, which cannot be folded"):
        run(tmp_path, Cascade(stage_steps=3), LoRA(rank=1, bias=True))
    with pytest.raises(SettingsError, match="NoiseInjection is there too"):
        run(tmp_path, Cascade(stage_steps=3, noise=0.1), extra=[NoiseInjection()])
    with pytest.raises(SettingsError, match=r'Cascade\.lr is "rewarm"; it acts on the schedule of AdapterModule'):
        run(tmp_path, Cascade(stage_steps=3, lr="rewarm"))


@pytest.mark.parametrize("mode", ["restore", "persist"])
@pytest.mark.parametrize("checkpoint", ["full", "adapter"])
def test_a_project_of_its_own_resumes_in_the_middle_of_a_stage(tmp_path, mode, checkpoint):
    """Its checkpoint holds the pretrained weight under its old name, whatever was folded into the layer."""

    def once(callbacks, **options):
        module = Wide(momentum=0.9)
        inject = InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"], seed=3, checkpoint=checkpoint)
        cascade = Cascade(stage_steps=5, blend=ALPHA, rule="figure_ema", noise=0.2, noise_mode=mode)
        trained = trainer(tmp_path, [inject, cascade, ExactResume(), *callbacks], max_steps=11)
        trained.fit(module, loader(), weights_only=True, **options)
        return module

    saved = tmp_path / "saved.ckpt"
    straight = once([SaveAt(saved, at_step(8))])  # an epoch: plain loaders have no position
    content = torch.load(saved, weights_only=True)
    if checkpoint == "full":
        assert torch.equal(content["state_dict"]["used.weight"], Wide().used.weight)
    resumed = once([], ckpt_path=saved)
    own, other = straight.state_dict(), resumed.state_dict()
    assert own.keys() == other.keys()
    assert any(".shifts." in key for key in own)
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert torch.equal(resumed.used.original_weight(), Wide().used.weight)
