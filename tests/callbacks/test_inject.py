"""InjectAdapters in projects that know nothing of adapters: eager, lazy, careless; their checkpoints stay intact."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from projects import Plain, fit, loader
from torch import nn
from toy_runs import trainer

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning import iter_adapters, load_adapter, set_active
from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks import InjectAdapters, SparsitySchedule, TrainingGuard
from lora_lightning.errors import ResumeError


def injecting(**options):
    return InjectAdapters(LoRA(rank=2), **{"targets": ["used"], "also_train": ["head"], **options})


def test_only_adapters_and_heads_move_though_the_project_hands_over_all_parameters(tmp_path):
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = fit(module, tmp_path, [injecting(), TrainingGuard()])
    assert {p for group in run.optimizers[0].param_groups for p in group["params"]} == {
        p for p in module.parameters() if p.requires_grad
    }
    assert torch.equal(module.used.base.weight, before["used.weight"])
    assert torch.equal(module.unused.weight, before["unused.weight"])
    assert not torch.equal(module.head.weight, before["head.weight"])


def test_a_lazy_module_is_injected_after_it_has_built_itself(tmp_path):
    class Lazy(Plain):
        def __init__(self):
            nn.Module.__init__(self)
            super(Plain, self).__init__()
            self.lr, self.built = 0.1, False

        def configure_model(self):
            if not self.built:
                self.used, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
                self.built = True

    module = Lazy()
    fit(module, tmp_path, [injecting(), TrainingGuard()])
    assert [path for path, _ in iter_adapters(module)] == ["used"]


def test_the_methods_callbacks_come_along_and_yield_to_one_given(tmp_path):
    run = fit(Plain(), tmp_path, [InjectAdapters(RoseLoRA(rank=2, start=2, end=4), ["used"])])
    assert sum(isinstance(callback, SparsitySchedule) for callback in run.callbacks) == 1
    own = SparsitySchedule(sparsity=0.5, start=2, end=3)
    run = fit(Plain(), tmp_path, [InjectAdapters(RoseLoRA(rank=2), ["used"]), own])
    assert [callback for callback in run.callbacks if isinstance(callback, SparsitySchedule)] == [own]


def test_a_penalty_is_added_to_the_projects_loss(tmp_path):
    losses = []

    @dataclass(frozen=True, kw_only=True)
    class Penalised(LoRA):
        def penalty(self, adapters: dict[str, Adapter]):
            losses.append(len(adapters))
            return 100.0 * sum(p.square().sum() for a in adapters.values() for p in a.parameters())

    module = Plain()
    callback = InjectAdapters(Penalised(rank=2), ["used"])
    plain, penalised = Plain(), module
    penalised.load_state_dict(plain.state_dict())
    callback.setup(trainer(tmp_path), penalised, "fit")
    batch = next(iter(loader()))
    difference = penalised.training_step(batch) - plain.training_step(batch)
    expected = 100.0 * sum(p.square().sum() for n, p in penalised.named_parameters() if ".adapters." in n)
    torch.testing.assert_close(difference, expected)
    assert losses == [1]


def test_the_projects_checkpoint_keeps_its_names_and_gains_a_section(tmp_path):
    module = Plain()
    names = set(module.state_dict())
    checkpoint = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    fit(module, tmp_path, [injecting(), checkpoint], enable_checkpointing=True, max_steps=8)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names
    assert set(saved["lora_lightning"]["tensors"]) == {
        "used.adapters.default.lora_A",
        "used.adapters.default.lora_B",
        "used.adapters.default.rank_mask",
        "head.weight",
        "head.bias",
    }
    plain = Plain()
    plain.load_state_dict(saved["state_dict"])
    assert torch.equal(plain.used.weight, module.used.base.weight)


@pytest.mark.parametrize("contents", ["full", "adapter"])
def test_resume_is_exact_with_either_kind_of_checkpoint(tmp_path, contents):
    torch.manual_seed(1)
    start = Plain().state_dict()

    def run(path, checkpoint=None, **options):
        module = Plain()
        module.load_state_dict(start)
        keep = ModelCheckpoint(path, "{step}", every_n_train_steps=8, save_top_k=-1)
        fit_ = trainer(path, [injecting(seed=2, checkpoint=contents), keep], enable_checkpointing=True, **options)
        fit_.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
        return module.state_dict()

    straight = run(tmp_path, max_steps=11)
    resumed = run(tmp_path, tmp_path / "step=8.ckpt", max_steps=11)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert bool(saved["state_dict"]) == (contents == "full")


def test_a_checkpoint_keeps_the_head_of_an_adapter_that_is_not_active(tmp_path):
    module = Plain()
    run = fit(module, tmp_path, [injecting()])
    trained = module.head.weight.detach().clone()
    set_active(module, [])
    assert not torch.equal(module.head.weight, trained)
    run.save_checkpoint(tmp_path / "kept.ckpt")
    tensors = torch.load(tmp_path / "kept.ckpt", weights_only=True)["lora_lightning"]["tensors"]
    assert torch.equal(tensors["head.weight"], trained)


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path):
    plain = ModelCheckpoint(tmp_path, "plain", enable_version_counter=False)
    fit(Plain(), tmp_path, [plain], enable_checkpointing=True, max_steps=8)
    run = trainer(tmp_path, [injecting(checkpoint="adapter"), plain], enable_checkpointing=True, max_steps=16)
    module = Plain()
    with pytest.raises(ResumeError, match="no adapter section: it was written without InjectAdapters"):
        run.fit(module, loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)


def test_the_adapter_is_written_where_asked_and_loads_into_a_plain_module(tmp_path):
    module = Plain()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, tmp_path, [injecting(directory=tmp_path / "adapter")])
    other = Plain()
    other.load_state_dict(start)
    load_adapter(other, tmp_path / "adapter")
    x = torch.randn(3, 4)
    assert torch.equal(other.head(other.used(x)), module.head(module.used(x)))


def test_a_module_that_has_adapters_is_not_injected_twice(tmp_path):
    module = Plain()
    run = trainer(tmp_path, [injecting()], max_steps=4)
    run.fit(module, loader())
    fit(module, tmp_path, [injecting()])
    assert len(list(iter_adapters(module))) == 1
    assert len(module.used.adapters) == 1
