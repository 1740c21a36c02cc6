"""Every place that a word of another tool is said to mean is a setting here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_lightning.cli import other_tools
from lora_lightning.cli.command_line import read
from lora_lightning.cli.configs import find_config
from lora_lightning.cli.lightning import CLI
from lora_lightning.registry import arguments
from lora_lightning.training.module import AdapterModule


@pytest.fixture(scope="module")
def known():
    class Built(CLI):
        def __init__(self):
            self.found = []
            with pytest.raises(SystemExit):
                super().__init__(read(["--config", "lora", "--help"]), run=False)

        def parse_arguments(self, parser, args):
            self.found += [action.dest for action in parser._actions]
            raise SystemExit

    return Built().found


@pytest.mark.parametrize("word", other_tools.SETTINGS)
def test_the_setting_is_one(known, word):
    said = other_tools.SETTINGS[word]
    if (config := re.match(r"--config (\S+)", said)) is not None:
        assert Path(find_config(config[1])).is_file()
        return
    place = said.partition(" ")[0]
    if place == "a":  # no setting, but a way to set one
        place = re.search(r"\((.*)\)", said)[1]
    section, _, name = place.partition(".")
    fields = {"model.method", "model.optimizer", "model.lr_scheduler"}
    inside = place.rpartition(".")[0] in fields or section in ("data", "resume")
    another_way = place in ("--config", "a")
    assert place in known or inside or another_way
    assert not (section == "model" and "." not in name and name not in arguments(AdapterModule))


def test_words_that_need_nothing_or_have_nothing_are_no_settings():
    assert not set(other_tools.UNNEEDED) & set(other_tools.ABSENT)
    both = set(other_tools.ABSENT) & set(other_tools.SETTINGS)
    assert both == {"special_tokens"}  # a list elsewhere in one tool, marks of the tokenizer in another


@pytest.mark.parametrize("word", other_tools.OPTIMIZERS)
def test_the_optimizer_is_one_of_torch(word):
    assert issubclass(getattr(torch.optim, other_tools.OPTIMIZERS[word]), torch.optim.Optimizer)
