"""Checkpoints of foreign projects: their own names, what the project reads without us, averages in any order."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from projects import Plain, fit, loader
from toy_runs import trainer

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.errors import SettingsError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),  # no shuffling
    pytest.mark.filterwarnings("ignore:.*Please add the following callbacks. ..ModelCheckpoint"),
]


def seeded():
    torch.manual_seed(0)
    return Plain()


def injecting(method=None, **options):
    return InjectAdapters(method or LoRA(rank=2), ["used"], **{"also_train": ["head"], "seed": 0, **options})


def run_of(module, folder, callbacks, steps=6, ckpt_path=None):
    run = trainer(folder, callbacks, max_steps=steps)
    run.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return run


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "mean": lambda: WeightAveraging(use_buffers=False),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_before_the_adapters_are_refused_with_the_right_order(tmp_path, kind):
    with pytest.raises(SettingsError, match=r"\w+Averaging stands before InjectAdapters .*; list InjectAdapters first"):
        fit(seeded(), tmp_path, [AVERAGES[kind](), injecting()])


@pytest.mark.parametrize("contents", ["full", "adapter"])
@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_a_run_with_averages_resumes_exactly_and_keeps_the_projects_names(tmp_path, kind, contents):
    names = set(seeded().state_dict())

    def run(folder, ckpt_path=None):
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
        parts = [injecting(checkpoint=contents), AVERAGES[kind](), keep]
        module = seeded()
        trainer(folder, parts, max_steps=11, enable_checkpointing=True).fit(
            module, loader(), ckpt_path=ckpt_path, weights_only=True
        )
        return state(module)

    straight = run(tmp_path / "kept")
    saved = torch.load(tmp_path / "kept" / "step=8.ckpt", weights_only=True)
    if contents == "full":
        assert set(saved["state_dict"]) == set(saved["current_model_state"]) == names
    assert "used.adapters.default.lora_B" in saved["lora_lightning"]["tensors"]
    assert equal(run(tmp_path / "kept", tmp_path / "kept" / "step=8.ckpt"), straight)


def test_the_section_holds_the_averaged_adapter_and_the_one_in_training(tmp_path):
    module, averages = seeded(), EMAWeightAveraging(decay=0.5)
    saving = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path / "run", [injecting(), averages, saving], max_steps=4, enable_checkpointing=True)
    run.fit(module, loader())
    key, expected = "used.adapters.default.lora_B", None
    for step in range(1, 5):
        section = torch.load(tmp_path / "kept" / f"step={step}.ckpt", weights_only=True)["lora_lightning"]
        current = section["current"][key]
        expected = current if expected is None else 0.5 * expected + 0.5 * current
        torch.testing.assert_close(section["tensors"][key], expected)
    assert not torch.equal(expected, current)


def test_a_mean_over_masks_is_refused_with_the_setting_that_helps(tmp_path):
    with pytest.raises(SettingsError, match=r"WeightAveraging.use_buffers is True.* masks .*; set it to False"):
        fit(seeded(), tmp_path, [injecting(), WeightAveraging()])


ROSE = RoseLoRA(rank=2, start=2, end=4, sparsity=0.5)


@pytest.mark.parametrize("method", [LoRA(rank=2), ROSE], ids=["LoRA", "RoseLoRA"])
def test_swa_after_the_adapters_averages_them(tmp_path, method):
    module = seeded()
    base = module.used.weight.detach().clone()
    fit(module, tmp_path, [injecting(method), AVERAGES["swa"]()], max_epochs=4, max_steps=-1)
    assert torch.equal(module.used.base.weight, base)
    assert module.used.adapters["default"].lora_B.any()


def test_who_reads_the_checkpoint_without_the_callback_is_told(tmp_path):
    module = seeded()
    run = fit(module, tmp_path, [injecting()])
    run.save_checkpoint(tmp_path / "own.ckpt")

    class Tested(Plain):
        def test_step(self, batch):
            self.log("loss", self.training_step(batch))

    with pytest.warns(UserWarning, match="add the following callbacks: .*without it the adapter in this file is not"):
        trainer(tmp_path / "plain", []).test(Tested(), loader(), ckpt_path=tmp_path / "own.ckpt", weights_only=True)
    plain = Plain()
    plain.load_state_dict(torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(plain.head.weight, module.head.weight)
    assert torch.equal(plain.used.weight, module.used.base.weight)


def test_a_checkpoint_of_a_version_whose_callback_had_no_state_is_read(tmp_path):
    module = seeded()
    fit(module, tmp_path, [injecting()], max_steps=3).save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    for key in [key for key in saved["callbacks"] if key.startswith("InjectAdapters")]:
        del saved["callbacks"][key]
    torch.save(saved, tmp_path / "old.ckpt")
    ends = []
    for name in ("own", "old"):
        other = seeded()
        run_of(other, tmp_path / name, [injecting()], ckpt_path=tmp_path / f"{name}.ckpt")
        ends.append(state(other))
    assert equal(*ends)
