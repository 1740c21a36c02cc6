"""What was injected trains, and what lies under it does not, in projects that freeze and thaw by themselves."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from projects import Plain, fit
from torch import nn

from ll_lora import LoRA
from lora_lightning import load_adapter, merge, save_adapter, set_trainable
from lora_lightning.callbacks import InjectAdapters, TrainingGuard
from lora_lightning.errors import TrainingError


class Milestone(BaseFinetuning):
    """Freezes the whole network, or all but the head, and thaws it at an epoch, as Lightning's example does."""

    def __init__(self, thaws_at: int = 1, freezes: str = "used") -> None:
        super().__init__()
        self.thaws_at, self.freezes = thaws_at, freezes

    def freeze_before_training(self, pl_module):
        self.freeze(getattr(pl_module, self.freezes))

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.thaws_at:
            self.unfreeze_and_add_param_group(pl_module.used, optimizer, lr=0.1)


def seeded():
    torch.manual_seed(0)
    return Plain()


def injecting(**options):
    return InjectAdapters(LoRA(rank=2), ["used"], **{"also_train": ["head"], **options})


def test_adapters_that_a_fine_tuning_callback_freezes_stop_the_run_before_its_first_step(tmp_path):
    module = Plain()
    message = r"used.*lora_A was frozen after it had been injected \(1 .*The callback Milestone freezes and thaws by"
    with pytest.raises(TrainingError, match=message):
        fit(module, tmp_path, [injecting(directory=tmp_path / "adapter"), Milestone()])
    assert not (tmp_path / "adapter").exists()


def test_a_head_that_a_fine_tuning_callback_freezes_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"head.weight was frozen after it had been injected \(2 adapters and"):
        fit(Plain(), tmp_path, [injecting(), Milestone(freezes="head")])


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # the adapter's own, which train
def test_base_weights_that_thaw_stop_the_run_at_their_first_step(tmp_path):
    """Listed first, the callback freezes before adapters are there, and thaws the weights under them later."""

    class Filters(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Filters()
    before = module.used.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"used.base.\w+ is a weight of the base model and trains.*Milestone"):
        fit(module, tmp_path, [Milestone(), injecting()], max_steps=20)
    assert torch.equal(module.used.base.weight, before)
    assert module.trainer.current_epoch == 1


def test_without_a_milestone_in_the_run_the_callback_does_no_harm(tmp_path):
    fit(Plain(), tmp_path, [Milestone(thaws_at=99), injecting()])


def test_a_base_that_somebody_thaws_before_training(tmp_path):
    class Thaws(Plain):
        def configure_optimizers(self):
            self.unused.requires_grad_(True)
            return super().configure_optimizers()

    with pytest.raises(TrainingError, match=r"unused.weight is a weight of the base model and trains"):
        fit(Thaws(), tmp_path, [injecting()])


def test_an_optimizer_over_a_part_of_the_module_leaves_an_adapter_out(tmp_path):
    class Partial(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if "head" in n], lr=0.1)

    message = r"used.*lora_A is in no optimizer \(2 injected tensors in all\).*build_optimizer"
    with pytest.raises(TrainingError, match=message):
        fit(Partial(), tmp_path, [injecting()])


def test_adapters_that_were_loaded_and_stay_frozen_are_no_fault(tmp_path):
    trained = seeded()
    fit(trained, tmp_path / "first", [injecting()])
    save_adapter(trained, tmp_path / "adapter")
    module = seeded()
    load_adapter(module, tmp_path / "adapter", "old")
    module.head.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"head.weight is a weight of the base model and trains"):
        fit(module, tmp_path / "second", [TrainingGuard()])
    set_trainable(module, "old")
    fit(module, tmp_path / "third", [TrainingGuard()])


def test_a_network_beside_the_injected_one_trains_as_it_likes(tmp_path):
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4))
            from lora_lightning import inject

            inject(self.net, LoRA(rank=2), ["0"])

        def training_step(self, batch):
            return super().training_step((self.net(batch[0]), batch[1]))

    module = Two()
    module.unused.requires_grad_(False)
    fit(module, tmp_path, [TrainingGuard()])


class Normalised(Plain):
    """With running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.norm(self.used(x))), y)


def adapters_freeze(module):
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(False)


def layer_is_replaced(module):
    module.used = nn.Linear(4, 4)


def layer_is_written(module):
    with torch.no_grad():
        module.used.base.weight.mul_(2)


def everything_thaws(module):
    module.requires_grad_(True)


def statistics_move(module):
    module.norm.running_mean.add_(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapters_freeze, r"used.*lora_A was frozen after it had been injected \(1 adapters"),
        (everything_thaws, r"used\.base\.weight is a weight of the base model and trains.*also_train"),
        (merge, r"used was merged while the run trains \(1 layers in all\).*Call unmerge"),
        (layer_is_replaced, r"used is no longer the layer that was injected \(1 in all\)"),
        (layer_is_written, r"used\.weight belongs to the frozen base model and has other values.*\(1 tensors"),
        (statistics_move, r"norm\.running_mean belongs to the frozen base model and has other values"),
    ],
)
def test_what_a_callback_does_in_the_middle_of_a_run_stops_it_before_anything_is_written(tmp_path, change, message):
    class Acts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                change(pl_module)

    torch.manual_seed(0)
    with pytest.raises(TrainingError, match=message):
        fit(Normalised(), tmp_path, [injecting(directory=tmp_path / "adapter"), Acts()], max_steps=8)
    assert not (tmp_path / "adapter").exists()


def test_statistics_of_a_layer_that_trains_may_move(tmp_path):
    torch.manual_seed(0)
    module, fresh = Normalised(), Normalised()
    fresh.load_state_dict(module.state_dict())
    fit(module, tmp_path, [injecting(also_train=["head", "norm"], directory=tmp_path / "adapter")])
    assert not torch.equal(module.norm.running_mean, fresh.norm.running_mean)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(module.norm.running_mean, fresh.norm.running_mean)
