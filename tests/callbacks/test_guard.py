"""The guard, in a LightningModule of its own that knows nothing of adapters' module."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from projects import Plain, fit, loader
from torch import nn
from toy_runs import trainer

from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters, TrainingGuard
from lora_lightning.errors import TrainingError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge


def test_a_layer_outside_the_loss_stops_the_run_with_its_name(tmp_path):
    with pytest.raises(TrainingError, match=r"not training after 3 optimizer steps .*unused.*lora_A \(no gradient\)"):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2)), TrainingGuard()])


def test_a_layer_outside_the_loss_is_named_before_the_first_step_with_what_leaves_it_out(tmp_path, capsys):
    said = (
        r'1 of 3 adapted layers have no part in the loss of the first step: unused. To leave .*: exclude=\["unused"\]'
    )
    module = Plain()
    with pytest.raises(TrainingError, match=said):
        fit(module, tmp_path, [InjectAdapters(LoRA(rank=2)), TrainingGuard(stop_unreached=True)])
    assert module.trainer.global_step == 0
    with pytest.raises(TrainingError, match=r'not training after 3 .* mend .*To leave them out: exclude=\["unused"\]'):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2))])
    assert re.search(f"note: {said}", capsys.readouterr().out)
    fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), exclude=["unused"]), TrainingGuard(stop_unreached=True)])


class Routed(Plain):
    """Its inputs go to one of two experts, by turns."""

    def __init__(self):
        super().__init__()
        self.unused = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.turn = 0

    def training_step(self, batch):
        x, y = batch
        self.turn += 1
        return nn.functional.cross_entropy(self.head(self.unused[self.turn % 2](self.used(x))), y)


def test_an_expert_that_no_input_is_sent_to_at_first_is_left_alone(tmp_path, capsys):
    guard = TrainingGuard(patience_steps=4, stop_unreached=True)
    fit(Routed(), tmp_path, [InjectAdapters(LoRA(rank=2)), guard], max_steps=8)
    assert "no part in the loss" not in capsys.readouterr().out
    assert all(distance > 0 for distance in guard.changed().values())


def test_all_used_layers_pass_and_the_distances_are_reported(tmp_path):
    guard = TrainingGuard()
    module = Plain()
    fit(module, tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"]), guard])
    assert set(guard.changed()) == {
        "used.adapters.default.lora_A",
        "used.adapters.default.lora_B",
        "head.weight",
        "head.bias",
    }
    assert all(distance > 0 for distance in guard.changed().values())


def test_a_run_at_a_rate_of_zero_trained_nothing(tmp_path):
    with pytest.raises(TrainingError, match="nothing was trained: no optimizer step with a rate above zero"):
        fit(Plain(lr=0.0), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])])


class Warmed(Plain):
    """Its rate, of steps 1 to 5, is too small to change a number in float32."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-12 if step < 5 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def test_a_rate_that_warms_up_has_time_until_the_end(tmp_path):
    guard = TrainingGuard()
    parts = [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])]
    fit(Warmed(), tmp_path, [*parts, guard], max_steps=9)
    assert all(distance > 0 for distance in guard.changed().values())
    with pytest.raises(TrainingError, match=r"whose rate has not come to a hundredth .*used.*lora_A \(did"):
        fit(Warmed(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])], max_steps=5)


class WarmedByHand(Plain):
    """Steps two optimizers itself, whose rates warm up."""

    automatic_optimization = False

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.manual_backward(loss)
        for optimizer, rates in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            rates.step()

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.used, self.head)]
        rates = torch.optim.lr_scheduler.LambdaLR
        return optimizers, [rates(one, lambda step: 1e-12 if step < 5 else 1.0) for one in optimizers]


def test_rates_of_several_optimizers_warm_up(tmp_path):
    guard = TrainingGuard()
    parts = [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"]), guard]
    fit(WarmedByHand(), tmp_path, parts, max_steps=16)
    assert all(distance > 0 for distance in guard.changed().values())


def test_a_short_run_is_judged_at_its_end(tmp_path):
    with pytest.raises(TrainingError, match=r"unused.*lora_B \(no gradient\)"):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used", "unused"], also_train=["head"])], max_steps=2)
    fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])], max_steps=1)


def test_an_optimizer_that_holds_only_the_head_is_found_without_asking(tmp_path):
    class HeadOnly(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.raises(TrainingError, match=r"used.*lora_A is in no optimizer \(2 injected tensors in all\)"):
        fit(HeadOnly(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])])


def test_a_parameter_that_breaks_after_the_last_gradient_is_found_at_the_end(tmp_path):
    class Breaks(Plain):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 6:
                self.used.adapters["default"].lora_B.data[0, 0] = float("nan")

    with pytest.raises(TrainingError, match=r"used.*lora_B has been trained to values that are not finite, 1 tensors"):
        fit(Breaks(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])])


def test_a_loss_that_diverges_is_named_as_the_cause_with_the_rate(tmp_path):
    class Squares(Plain):
        def training_step(self, batch):
            return self.head(self.used(batch[0])).square().sum()

    with pytest.raises(TrainingError, match=r"The loss has gone from [\d.e+]+ to .* at a learning rate of 1000: it"):
        fit(Squares(lr=1000.0), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])], max_steps=20)


def test_a_norm_that_overflows_is_no_number_either(tmp_path):
    class Huge(Plain):
        def training_step(self, batch):
            return super().training_step(batch) * 1e30

    with pytest.raises(TrainingError, match="at optimizer step 1: the gradient norm overflows"):
        fit(Huge(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"])])


def test_no_movement_at_a_rate_stops_the_run(tmp_path):
    class Frozen(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            before = [p.detach().clone() for p in self.parameters()]
            optimizer.step(closure)
            with torch.no_grad():
                for parameter, value in zip(self.parameters(), before, strict=True):
                    parameter.copy_(value)

    with pytest.raises(TrainingError, match="did not change"):
        fit(Frozen(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"]), TrainingGuard()])


def test_idle_tensors_are_not_judged(tmp_path, monkeypatch):
    from lora_lightning.adapters.low_rank import LowRankAdapter

    monkeypatch.setattr(LowRankAdapter, "idle", lambda self: frozenset({"lora_A", "lora_B"}))
    fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used", "unused"], also_train=["head"]), TrainingGuard()])


def test_nan_loss_stops_the_run_and_names_the_step(tmp_path):
    class Diverging(Plain):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss * float("nan") if self.global_step == 2 else loss

    with pytest.raises(TrainingError, match=r"not a number at optimizer step 3: .*Lower the learning rate"):
        fit(Diverging(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"]), TrainingGuard()])


def test_nothing_trainable_is_refused(tmp_path):
    class AllFrozen(Plain):
        def configure_optimizers(self):
            self.requires_grad_(False)
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(TrainingError, match="nothing trains"):
        fit(AllFrozen(), tmp_path, [TrainingGuard()])


def test_merged_adapters_are_refused(tmp_path):
    module = Plain()
    inject(module, LoRA(rank=2), ["used"])
    merge(module)
    with pytest.raises(TrainingError, match="1 layers are merged, used first; call unmerge"):
        fit(module, tmp_path, [TrainingGuard()])


def test_a_resumed_run_measures_from_its_first_start(tmp_path):
    start = Plain().state_dict()
    guards = []
    for checkpoint in (None, tmp_path / "step=8.ckpt"):
        module, guard = Plain(), TrainingGuard()
        module.load_state_dict(start)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
        inject_ = InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"], seed=1)
        run = trainer(tmp_path, [inject_, guard, keep], enable_checkpointing=True, max_steps=12)
        run.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
        guards.append(guard)
    assert guards[0].changed() == guards[1].changed()
    assert guards[1]._real == guards[0]._real
