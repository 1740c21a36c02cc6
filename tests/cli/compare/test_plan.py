from __future__ import annotations

import comparisons
import pytest

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
