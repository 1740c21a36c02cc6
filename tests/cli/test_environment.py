"""Variables of the parser: those that set something are told, those that set nothing are refused."""

from __future__ import annotations

import argparse

import pytest

from lora_lightning.cli.environment import used
from lora_lightning.errors import SettingsError


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    fit = parser.add_subparsers(dest="verb").add_parser("fit")
    fit.add_argument("--trainer.max_steps")
    fit.add_argument("--model.method")
    return parser


def test_a_variable_that_sets_something_is_told(parser, monkeypatch):
    assert used(parser, "fit") == []
    monkeypatch.setenv("LORA_LIGHTNING_FIT__TRAINER__MAX_STEPS", "5")
    monkeypatch.setenv("LORA_LIGHTNING_PREDICT__NOTHING", "5")  # another verb's
    (line,) = used(parser, "fit")
    assert line.startswith("environment: LORA_LIGHTNING_FIT__TRAINER__MAX_STEPS=5 sets trainer.max_steps")
    assert used(parser, None) == []


@pytest.mark.parametrize("name", ["TRAINER__MAX_STEP", "MODEL__METHOD__RANK", "MODEL_METHOD"])
def test_a_misspelt_variable_is_refused(parser, monkeypatch, name):
    monkeypatch.setenv(f"LORA_LIGHTNING_FIT__{name}", "5")
    with pytest.raises(SettingsError, match=rf"sets LORA_LIGHTNING_FIT__{name}, which is no setting of fit\. Did you"):
        used(parser, "fit")
