"""Noise on frozen weights: how it is drawn, when it is on, what it leaves behind."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from projects import Watch, Wide, fit
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters, NoiseInjection
from lora_lightning.callbacks.noise import StageNoise, ahead
from lora_lightning.errors import AdapterStateError, NoEffectError, SettingsError
from lora_lightning.injection.records import iter_adapters
from lora_lightning.seeds import generator


@pytest.mark.parametrize("threads", [1, 3])
def test_noise_is_drawn_ahead_on_other_threads_and_no_other(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module = LightningModule()
    module.net = nn.Sequential(*[nn.Linear(8, width, dtype=torch.bfloat16) for width in (5, 6, 7, 8, 9, 10)])
    ll.inject(module.net, LoRA(rank=2), [str(i) for i in range(6)], also_train=(), seed=3)
    before = [layer.base.weight.clone() for _, layer in iter_adapters(module)]
    paths = {f"{path}.adapters.default": layer for path, layer in iter_adapters(module)}
    noise = StageNoise(0.2)
    noise.place(module, paths, 2, None)
    for i, (original, (path, layer)) in enumerate(zip(before, iter_adapters(module), strict=True)):
        assert path == f"net.{i}"
        uniform = torch.rand(original.shape, generator=generator(3, "noise", 2, path)) - 0.5
        expected = original.float() + 0.2 * float(original.float().std()) * uniform
        assert torch.equal(layer.base.weight, expected.bfloat16())
    noise.lift(module, paths)
    assert all(torch.equal(layer.base.weight, w) for w, (_, layer) in zip(before, iter_adapters(module), strict=True))


def test_calls_that_are_made_ahead_keep_their_order_and_are_few():
    made = []

    def call(number):
        made.append(number)
        return number

    found = ahead([partial(call, number) for number in range(9)], threads=2)
    assert next(found) == 0
    assert len(made) <= 3
    assert list(found) == list(range(1, 9))
    assert sorted(made) == list(range(9))


class TestNoiseInjection:
    @pytest.mark.parametrize("mode", ["restore", "persist"])
    def test_in_any_project(self, tmp_path, mode):
        module = Wide()
        start = module.used.weight.detach().clone()
        inject = InjectAdapters(LoRA(rank=1), ["used"], also_train=["head"], seed=3, directory=tmp_path / "adapter")
        watch = Watch(6)
        fit(module, tmp_path, [inject, NoiseInjection(0.3, mode), watch], max_steps=4)
        update = module.used.adapter("default").low_rank()
        noise = watch.seen[4] - start - update[1] @ update[0]
        assert 0 < float(noise.abs().max()) <= 0.15 * float(start.std()) * (1 + 1e-9)
        kept = module.used.weight.detach() - start - update[1] @ update[0]
        expected = noise if mode == "persist" else torch.zeros_like(noise)
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12)
        fresh = Wide()
        ll.load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(fresh.used.weight, module.used.weight)
        ll.eject(module)
        assert torch.equal(module.used.weight, start)

    def test_without_adapters_there_is_nothing_to_act_on(self, tmp_path):
        with pytest.raises(NoEffectError, match="found nothing to act on"):
            fit(Wide(), tmp_path, [NoiseInjection()])

    def test_rules(self):
        with pytest.raises(SettingsError, match=r"NoiseInjection\.strength is 0\.0; it must be above 0"):
            NoiseInjection(0.0)
        with pytest.raises(SettingsError, match=r'it must be "restore" or "persist"'):
            NoiseInjection(mode="keep")

    def test_a_tied_weight_is_refused(self, tmp_path):
        module = Wide()
        module.twin = nn.Linear(4, 12).double()
        module.twin.weight = module.used.weight
        with pytest.raises(AdapterStateError, match="shared with twin"):
            fit(module, tmp_path, [InjectAdapters(LoRA(rank=1), ["used"], also_train=["head"]), NoiseInjection()])
