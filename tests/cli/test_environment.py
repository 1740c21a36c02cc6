"""Variables of the parser: those that set something are told, those that set nothing are refused."""

from __future__ import annotations

import argparse

import pytest

from lora_lightning.cli.environment import refuse_rank, used
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


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RUNN", "LORA_LIGHTNING_RUN"),
        ("FITT__TRAINER__MAX_STEPS", "LORA_LIGHTNING_FIT__TRAINER__MAX_STEPS"),
        ("FIT_TRAINER__MAX_STEPS", "LORA_LIGHTNING_FIT__TRAINER__MAX_STEPS"),
        ("CONFIG", ""),
        ("SEED_EVERYTHING", ""),
    ],
)
def test_a_variable_that_nothing_reads_is_refused(parser, monkeypatch, name, near):
    monkeypatch.setenv(f"LORA_LIGHTNING_{name}", "5")
    with pytest.raises(SettingsError, match=rf"sets LORA_LIGHTNING_{name}, which nothing reads\..*{near}"):
        used(parser, "fit")


def test_help_is_no_setting(parser, monkeypatch):
    monkeypatch.setenv("LORA_LIGHTNING_FIT__HELP", "1")
    with pytest.raises(SettingsError, match="LORA_LIGHTNING_FIT__HELP, which is no setting of fit"):
        used(parser, "fit")


@pytest.mark.parametrize("size", ["many", "-1", "nan", "inf"])
def test_a_size_of_the_cache_that_is_no_number(parser, monkeypatch, size):
    monkeypatch.setenv("LORA_LIGHTNING_CACHE_GB", size)
    with pytest.raises(SettingsError, match=rf'sets LORA_LIGHTNING_CACHE_GB to "{size}"; it must be a number of giga'):
        used(parser, "fit")


def test_variables_of_other_purposes_are_let_be(parser, monkeypatch):
    for name in ("CACHE_GB", "COMPLETE", "DEBUG", "RUN", "TEST_DATA"):
        monkeypatch.setenv(f"LORA_LIGHTNING_{name}", "5")
    assert used(parser, "fit") == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_rank_that_is_left_over_from_another_launch(monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with pytest.raises(
        SettingsError, match=rf"^the environment sets {name}=3, as a launcher does .* Unset it, or give"
    ):
        refuse_rank(3)
