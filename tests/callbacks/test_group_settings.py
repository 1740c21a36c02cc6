"""Rates, decay and clipping that a method wants for a group, in modules that build their own optimizer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import Plain, fit

from ll_dora import DoRA
from ll_lora import LoRA
from ll_riemannian_moe import MoELoRA
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.errors import TrainingError
from lora_lightning.injection.records import trainable_adapters
from lora_lightning.optim.groups import build_optimizer

MOE = MoELoRA(experts=3, top_k=2, rank=2, router_lr_ratio=0.25, router_clip=1e-3)


class Decays(Plain):
    """AdamW over everything, as most projects have it."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


class Scheduled(Decays):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def injecting(method):
    return InjectAdapters(method, ["used"], also_train=["head"], seed=0)


def group_of(run, parameter):
    (found,) = [g for g in run.optimizers[0].param_groups if any(p is parameter for p in g["params"])]
    return found


def routers(module):
    return [p for a in trainable_adapters(module).values() for n, p in a.named_parameters() if "router" in n]


def test_routers_have_their_rate_and_norm(tmp_path, capsys):
    norms = []

    class Look(Callback):
        phase = 1

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append(torch.stack([p.grad.norm() for p in routers(pl_module)]).norm())

    module = Decays()
    run = fit(module, tmp_path, [injecting(MOE), Look()])
    group = group_of(run, routers(module)[0])
    assert (group["lr"], group["clip"]) == (0.025, 1e-3)
    assert {id(p) for p in group["params"]} == {id(p) for p in routers(module)}
    assert group_of(run, module.head.weight)["lr"] == 0.1
    assert max(norms) <= 1e-3 * 1.0001
    assert "AdamW: group router has its own lr_ratio=0.25, clip=0.001" in capsys.readouterr().out


def test_magnitudes_do_not_decay(tmp_path):
    """With a decay of 0.5 and a loss that does not depend on the layer they would shrink by 5 % a step."""

    class Still(Decays):
        def training_step(self, batch):
            return super().training_step(batch) * 0.0

    module = Still()
    injector = injecting(DoRA(rank=2))
    with pytest.raises(TrainingError, match="no gradient"):  # which it is: the guard ends such a run
        fit(module, tmp_path, [injector])
    magnitude = module.used.adapters["default"].magnitude
    torch.testing.assert_close(magnitude.detach(), module.used.base.weight.norm(dim=1))
    assert group_of(module.trainer, magnitude)["weight_decay"] == 0.0
    assert group_of(module.trainer, module.head.weight)["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("method", "wants"),
    [(MOE, r"router\" of the adapters wants lr_ratio=0.25, clip"), (DoRA(rank=2), "weight_decay=0.0")],
)
def test_groups_that_a_scheduler_knows_are_refused_with_the_two_lines(tmp_path, method, wants):
    with pytest.raises(TrainingError, match=rf"{wants}.*Two lines of Scheduled.configure_opt.*build_optimizer\("):
        fit(Scheduled(), tmp_path, [injecting(method)])


def test_the_two_lines_make_it_act(tmp_path):
    class TwoLines(Decays):
        def configure_optimizers(self):
            optimizer = build_optimizer(self, lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5))
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]

    module = TwoLines()
    run = fit(module, tmp_path / "moe", [injecting(MOE)])
    assert group_of(run, routers(module)[0])["lr"] == pytest.approx(0.025)
    module = TwoLines()
    run = fit(module, tmp_path / "dora", [injecting(DoRA(rank=2))])
    assert group_of(run, module.used.adapters["default"].magnitude)["weight_decay"] == 0.0


def test_a_group_of_the_projects_own_keeps_its_rate(tmp_path):
    class Own(Plain):
        def configure_optimizers(self):
            router = routers(self)
            rest = [p for p in self.parameters() if all(p is not r for r in router)]
            return torch.optim.SGD([{"params": router, "lr": 0.03}, {"params": rest}], lr=0.1)

    module = Own()
    run = fit(module, tmp_path, [injecting(MOE)])
    assert len(run.optimizers[0].param_groups) == 2
    group = group_of(run, routers(module)[0])
    assert (group["lr"], group["clip"]) == (0.03, 1e-3)


def test_a_method_that_wants_nothing_leaves_the_optimizer_as_it_is(tmp_path):
    run = fit(Scheduled(), tmp_path, [injecting(LoRA(rank=2))])
    assert len(run.optimizers[0].param_groups) == 1
