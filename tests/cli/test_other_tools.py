"""Every place that a word of another tool is said to mean is a setting here."""

from __future__ import annotations

import pytest

from lora_lightning.cli import other_tools
from lora_lightning.cli.command_line import read
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
    place = other_tools.SETTINGS[word].partition(" ")[0]
    section, _, name = place.partition(".")
    fields = {"model.method", "model.optimizer", "model.lr_scheduler"}
    inside = place.rpartition(".")[0] in fields or section in ("data", "resume")
    another_way = place in ("--config", "a")
    assert place in known or inside or another_way
    assert not (section == "model" and "." not in name and name not in arguments(AdapterModule))
