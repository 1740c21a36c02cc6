from __future__ import annotations

import dataclasses

import comparisons
import pytest

from lora_lightning.cli.compare import plan as plan_of
from lora_lightning.cli.compare.arms import Arm
from lora_lightning.cli.compare.plan import Plan, planned_arms, quiet, rate_words, seed_words
from lora_lightning.errors import RunFolderError, SettingsError


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = comparisons.plan(searched={"model.method.alpha": "8..64:log"}, also=("--config", "x"), until=0.01)
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no plan\.json, so it is no comparison's folder"):
        Plan.read(tmp_path)


def test_words_of_rates_and_seeds():
    (first, *_) = comparisons.plan().arms
    assert rate_words(first, 1e-3) == ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.001"]
    assert seed_words(first, 2) == ["--seed_everything", "2", "--data.seed", "2"]


WORDS = ["--config", "lora", "--data.limit", "16"]


@pytest.mark.slow
def test_arms_are_described_and_their_ranks_solved():
    told: list[str] = []
    arms = [Arm("LoRA", {"model.method": "LoRA"}), Arm("Rose", {"model.method": "RoseLoRA"}), Arm("linear", LINEAR)]
    first, rose, linear = planned_arms(WORDS, arms, "100k", told.append)
    assert abs(first.facts.adapter_numbers - 100_000) < 30_000
    assert first.facts.adapter_numbers == rose.facts.adapter_numbers
    assert first.words[-2] == "--model.method.rank"
    assert linear.facts.adapter_numbers == 0
    assert list(first.words[: len(quiet())]) == quiet()
    assert ", rank " in told[0]
    assert "for a budget of 100,000" in told[0]


LINEAR = {"model.targets": "none"}


def test_arms_of_two_tasks_cannot_be_compared():
    arms = [Arm("a"), Arm("b", {}, ("tasks/regression",))]
    with pytest.raises(SettingsError, match=r'"b" is measured by pearson, and "a" by accuracy; arms need one task'):
        planned_arms(["--config", "lora"], arms, None, print)


def test_further_arms_stand_behind_those_that_have_begun(monkeypatch):
    """Neither described nor given another rank again; their budget holds for the new ones."""
    begun = comparisons.plan().arms
    first = begun[0]
    there = (dataclasses.replace(first, words=(*quiet(), *WORDS, *first.arm.words(), "--model.method.rank", "4")),)
    asked: list[list[str]] = []

    def describe(words):
        asked.append(words)
        return first.facts

    monkeypatch.setattr(plan_of, "describe", describe)
    arms = [Arm("new", {"model.method": "DoRA"}), first.arm]
    found = planned_arms(WORDS, arms, "same", lambda line: None, there)
    assert [one.arm.name for one in found] == [first.arm.name, "new"]
    assert found[0] is there[0]
    assert asked == [[*quiet(), *WORDS, *arms[0].words()]]
    with pytest.raises(SettingsError, match=r"was planned with other settings \(17\); its runs keep them"):
        planned_arms([*WORDS[:-1], "17"], arms, "same", lambda line: None, there)
