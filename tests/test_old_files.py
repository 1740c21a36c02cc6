"""Files that version 0.1 wrote: configs, runs that have finished or were stopped, adapter folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.cli import command_line
from lora_lightning.cli.lightning import CLI
from lora_lightning.cli.main import main
from lora_lightning.testing import perturb, tiny_decoder, tiny_encoder

OLD = Path(__file__).parent / "old_files"
CONFIGS = sorted(path.stem for path in (OLD / "configs").glob("*.yaml"))
FINISHED = sorted(path.parent.name for path in (OLD / "runs").glob("*/001"))
STOPPED = sorted(path.parent.name for path in (OLD / "runs").glob("*/002"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with all of them."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    plugins.load()
    return tmp_path


class ParsedError(Exception):
    """Ends a command line that has been parsed."""


class Parsing(CLI):
    def parse_arguments(self, parser, args):
        super().parse_arguments(parser, args)
        raise ParsedError(self.config.as_dict())


def parsed(*line):
    with pytest.raises(ParsedError) as caught:
        Parsing(command_line.read(line))
    return caught.value.args[0]["fit"]


def leaves(node, key=""):
    """Values of a config by the last part of their keys."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, key)
    else:
        yield key, node


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_parsed_and_no_value_is_lost(here, name):
    """What a setting or a class is called may have changed since, but not what the settings are."""
    path = Path("configs") / f"{name}.yaml"
    config = parsed("fit", "--config", str(path))
    old, new = (dict(leaves(one)) for one in (yaml.safe_load(path.read_text()), config))
    values = [value for key, value in old.items() if key not in ("class_path", *new)]
    others = [value for key, value in new.items() if key not in old]
    assert all(value in others for value in values)
    assert old.items() & new.items()
    assert config["model"]["quantization"] == old.get("quantisation")
    share = yaml.safe_load(path.read_text())["model"].get("lr_scheduler", {}).get("share", 0.06)
    assert share in config["model"]["lr_scheduler"].values()


def test_flags_of_then_are_understood(here):
    flags = ["--model.quantisation=int8", "--model.lr_scheduler.share", "0.5", "--data.validation_share=0.25"]
    config = parsed("fit", "--config", "configs/lorasc.yaml", *flags, "--model.method.share=0.125")
    assert config["model"]["quantization"] == "int8"
    assert 0.5 in config["model"]["lr_scheduler"].values()
    assert 0.25 in config["data"]["init_args"].values()
    assert 0.125 in config["model"]["method"]["init_args"].values()


@pytest.mark.slow
@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_validated(here, name, capsys):
    assert main(["validate", "--run", f"runs/{name}/001"]) == 0
    assert "val_accuracy" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the folder has moved since
@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_to_the_end_that_one_without_a_stop_has_reached(here, name):
    assert main(["fit", "--resume", f"runs/{name}/002"]) == 0
    whole, resumed = (load_file(f"runs/{name}/{run}/adapter/adapter.safetensors") for run in ("001", "002"))
    torch.testing.assert_close(resumed, whole)


def test_an_adapter_with_new_tokens_is_loaded():
    net = tiny_decoder(tied=True)
    layers = json.loads((OLD / "adapters" / "new_tokens" / "adapter.json").read_text())["layers"]
    for path in layers:
        perturb(net.get_submodule(path))  # as they were when it was saved
    ll.load_adapter(net, OLD / "adapters" / "new_tokens")
    assert {path for path, _ in ll.iter_adapters(net)} == set(layers)
    assert net(input_ids=torch.tensor([[3, 32, 33]])).logits.shape[-1] == 34
    check_tensors(net, "new_tokens")


def test_an_adapter_with_dense_folded_updates_is_loaded():
    net = tiny_encoder()
    ll.load_adapter(net, OLD / "adapters" / "dense_shift")
    ranks = {path: layer.adapter("default").lora_A.shape[0] for path, layer in ll.iter_adapters(net)}
    assert sorted(ranks.values()) == [1, 2]
    check_tensors(net, "dense_shift")


def check_tensors(net, name):
    """The model holds every tensor of the file under the name that it has there."""
    state = net.state_dict()
    for key, value in load_file(OLD / "adapters" / name / "adapter.safetensors").items():
        found = next(tensor for full, tensor in state.items() if full.endswith(key))
        torch.testing.assert_close(found, value)
