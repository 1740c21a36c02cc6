"""Settings that an optimizer refuses are named with their place, value and rule, whoever wrote the optimizer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Muon, Optimizer, RMSprop, Rprop
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from ll_lorasc.optim import SlowFast
from ll_optimizers.plus import LoRAPlus
from ll_optimizers.pro import LoRAPro
from ll_optimizers.rite import LoRARITE
from lora_lightning import inject
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.groups import build_optimizer


class AtLast(Optimizer):
    """Of somebody: refuses with his own error after the groups are made; its rate has no default."""

    def __init__(self, params, lr, *, gain=1.0, **more):
        super().__init__(params, {"lr": lr, "gain": gain, **more})
        assert lr > 0
        if gain + more.get("shift", 0) > 2:
            raise RuntimeError("too much")


class AtOnce(Optimizer):
    def __init__(self, params, speed=1.0, names=("a",)):
        if not speed:
            raise LookupError
        super().__init__(params, {"speed": speed, "names": names})


def built(factory, where="model.optimizer"):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject(net, LoRA(rank=2), ["0"])
    return build_optimizer(net, factory, where=where)


PLACE = r"^model\.optimizer\.init_args\."
CASES = {
    "rate": (
        partial(AdamW, lr=-1),
        r"lr is -1; it must be at least 0\. AdamW says \"Invalid learning rate: -1\"\. Its",
    ),
    "default": (partial(AdamW, lr=-1), r"lr .* Its default is 0\.001\.$"),
    "betas": (partial(Adam, betas=(0.9, 2.0)), r"betas is \(0\.9, 2\.0\); both must lie in \[0, 1\); .* index 1: 2\.0"),
    "eps": (partial(AdamW, eps=-1e-8), r"eps is -1e-08; it must be above 0; 1e-8 .*Its default is 1e-08\.$"),
    "decay": (partial(Adamax, weight_decay=-0.1), r"weight_decay is -0\.1; it must be at least 0\."),
    "momentum": (partial(SGD, lr=0.1, momentum=-1), r"momentum is -1; SGD says \"Invalid momentum value: -1\"\. Its"),
    "combination": (partial(SGD, lr=0.1, nesterov=True), r"nesterov is True; SGD says \"Nesterov momentum requires a"),
    "alpha": (partial(RMSprop, alpha=-0.5), r"alpha is -0\.5; RMSprop says"),
    "rho": (partial(Adadelta, rho=1.5), r"rho is 1\.5; Adadelta says"),
    "lr_decay": (partial(Adagrad, lr_decay=-1), r"lr_decay is -1; Adagrad says"),
    "etas": (partial(Rprop, etas=(2.0, 0.5)), r"etas is \(2\.0, 0\.5\); Rprop says"),
    "two at once": (partial(AdamW, lr=-1, eps=-1), r"lr is -1; it must be at least 0"),
    "ours": (partial(LoRARITE, lr=-1.0), r"lr is -1\.0; it must be at least 0\.$"),
    "a choice of ours": (partial(LoRAPro, balance="none"), r"balance is 'none'; it takes closest, symmetric, zero\.$"),
    "around another": (partial(SlowFast, blend=2), r"blend is 2; it must lie in \(0, 1\]"),
    "inside": (partial(SlowFast, inner=partial(AdamW, lr=-1)), r"inner\.init_args\.lr is -1; it must be at least 0"),
    "inside twice": (
        partial(SlowFast, inner=partial(LoRAPlus, inner=partial(SGD, momentum=-1))),
        r"inner\.init_args\.inner\.init_args\.momentum is -1; SGD",
    ),
    "an assertion of somebody": (partial(AtLast, lr=0.0), r"lr is 0\.0; AtLast says"),
    "keyword only": (
        partial(AtLast, lr=1.0, gain=3.0),
        r"gain is 3\.0; AtLast says \"too much\"\. Its default is 1\.0\.$",
    ),
    "an error without words": (partial(AtOnce, speed=0), r"speed is 0; AtOnce refuses it\. Its default is 1\.0\.$"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_setting_is_named(case):
    factory, text = CASES[case]
    with pytest.raises(SettingsError, match=PLACE + text):
        built(factory)


def test_without_a_place_the_class_stands_for_it():
    with pytest.raises(SettingsError, match=r"^AdamW\.lr is -1; it must be at least 0"):
        built(lambda groups: AdamW(groups, lr=-1), where="")
    with pytest.raises(SettingsError, match=r"^LoRARITE\.lr is -1\.0; it must be at least 0\.$"):
        built(lambda groups: LoRARITE(groups, lr=-1.0), where="")


def test_what_is_no_settings_fault_stays_as_it_was_raised():
    def broken(groups):
        raise OSError("no driver")

    def untrained(groups):
        raise TrainingError("nothing trains")

    for factory, kind in ((broken, OSError), (untrained, TrainingError), (partial(AdamW, speed=1), TypeError)):
        with pytest.raises(kind):
            built(factory)
    with pytest.raises(SettingsError, match=r"^model\.optimizer: Muon only supports 2D parameters"):
        built(lambda groups: Muon([{"params": [nn.Parameter(torch.zeros(2))]}]))
    with pytest.raises(SettingsError, match=r"^SlowFast\.inner holds a SlowFast already"):
        built(partial(SlowFast, inner=SlowFast), where="")


def test_groups_are_as_they_were_for_an_optimizer_that_is_taken():
    groups = built(partial(AtLast, lr=0.5, gain=2.0)).param_groups
    assert [(group["name"], group["lr"], group["gain"]) for group in groups] == [("A", 0.5, 2.0), ("B", 0.5, 2.0)]


def test_a_rate_of_zero_is_refused_before_the_run():
    for factory in (partial(AdamW, lr=0.0), partial(SlowFast, inner=partial(SGD, lr=0))):
        with pytest.raises(SettingsError, match=r"^model\.optimizer: its rate \(lr\) is 0, so that nothing would be"):
            built(factory)
    assert built(partial(AdamW, lr=0.0), where="").param_groups[0]["lr"] == 0  # a schedule of one's own may set it


def test_a_run_in_python(tmp_path):
    folder = encoder_folder(tmp_path / "model")
    module = classification(folder, LoRA(rank=2), optimizer=lambda groups: AdamW(groups, lr=-1.0))
    with pytest.raises(SettingsError, match=PLACE + r"lr is -1\.0; it must be at least 0"):
        trainer(tmp_path, max_steps=1).fit(module, labelled_data(folder))
