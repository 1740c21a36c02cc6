import sys
from types import SimpleNamespace

import pytest
from torch import nn

from lora_lightning import plugins
from lora_lightning.cli.main import main
from lora_lightning.injection.inject import inject


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, classes)


class Module(nn.Module):
    """What `targets` needs of an AdapterModule."""

    num_labels = None
    injection = None

    def configure_model(self):
        self.model = Net(self.num_labels)
        method = plugins.method("LoRA")(rank=2)
        self.injection = inject(self.model, method, targets=["first", "last"], overrides={"last": {"rank": 3}})


@pytest.fixture
def module(monkeypatch):
    built = Module()
    data = SimpleNamespace(num_labels=5)
    monkeypatch.setitem(sys.modules, "lora_lightning.cli.lightning", SimpleNamespace(build=lambda words: (built, data)))
    return built


def test_rank_and_parameters_follow_overrides(module, capsys):
    assert main(["targets", "{}"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "Layer Kind d_in x d_out Rank Parameters"
    assert lines[2:4] == ["first linear 6 x 4 2 20", "last linear 4 x 5 3 27"]
    assert lines[4].startswith("LoRA on 2 layers: 47 of ")


def test_what_is_left_out_is_said_with_the_reason(module, capsys, monkeypatch):
    def configure_model():
        Module.configure_model(module)
        module.injection.skipped["pooler"] = "a reason"

    monkeypatch.setattr(module, "configure_model", configure_model)
    assert main(["targets", "{}"]) == 0
    assert "left out: pooler (a reason)" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "used"), [(None, 5), (3, 3)])
def test_the_data_say_how_many_classes_unless_the_config_does(module, monkeypatch, given, used):
    monkeypatch.setattr(module, "num_labels", given)
    assert main(["targets", "{}"]) == 0
    assert module.injection.layers["last"] == ("linear", 4, used)


def test_a_module_that_injects_nothing(module, monkeypatch, capsys):
    monkeypatch.setattr(module, "configure_model", lambda: None)
    assert main(["targets", "{}"]) == 2
    assert capsys.readouterr().err == "error: configure_model injected nothing.\n"
