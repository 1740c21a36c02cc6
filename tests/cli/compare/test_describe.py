from __future__ import annotations

import pytest

from lora_lightning.cli.compare.describe import describe, parse_budget, solve_rank
from lora_lightning.errors import SettingsError

WORDS = ("--config", "lora")


def test_sizes_metric_and_rate_without_weights():
    facts = describe(WORDS)
    assert (facts.method, facts.metric, facts.higher_is_better) == ("LoRA", "accuracy", True)
    layers = 6 * (4 * (384 + 384) + 2 * (384 + 1536))  # MiniLM: four square layers and two wide ones a block
    assert facts.adapter_numbers == 16 * layers
    assert facts.head_numbers == 384 * 384 + 384 + 8 * 384 + 8
    assert facts.size_field == "model.method.rank"
    assert facts.optimizer_words == ()
    assert facts.tunable
    assert facts.data_seed


def test_an_optimizer_that_is_the_methods_own():
    facts = describe(("--config", "riemannian_moe", "--model.optimizer", "null"))
    assert facts.optimizer_words == ("--model.optimizer", "RiemannianAdamW")


def test_the_rate_of_an_optimizer_around_another_is_the_inner_ones():
    around = ("--config", "lora", "--model.optimizer", "LoRAPlus", "--model.optimizer.ratio", "4")
    alone = describe(around)
    assert (alone.rate_field, alone.rate) == ("model.optimizer.inner.lr", 1e-3)
    assert alone.optimizer_words == ("--model.optimizer.inner", "AdamW")
    named = describe((*around, "--model.optimizer.inner", "SGD", "--model.optimizer.inner.lr", "0.3"))
    assert (named.rate_field, named.rate, named.optimizer_words) == ("model.optimizer.inner.lr", 0.3, ())


def test_a_method_around_another_one_has_the_rank_inside():
    assert describe(("--config", "lorasc")).size_field == "model.method.inner.rank"


@pytest.mark.slow
def test_the_nearest_rank_to_a_budget():
    facts = describe(WORDS)
    one = facts.adapter_numbers // 16
    assert solve_rank(WORDS, facts, 5 * one + one // 3) == (5, 5 * one)
    assert solve_rank(WORDS, facts, one) == (1, one)
    with pytest.raises(SettingsError, match=r"LoRA gets no nearer than"):
        solve_rank(WORDS, facts, one // 4)


@pytest.mark.parametrize(
    ("text", "numbers"), [("400k", 400_000), ("1.5M", 1_500_000), ("0.5%", 5_000), ("same", 77), ("123", 123)]
)
def test_budgets(text, numbers):
    assert parse_budget(text, 1_000_000, 77) == numbers


@pytest.mark.parametrize("text", ["", "k", "-3", "lots", "0%"])
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(SettingsError, match=r"write numbers such as 400k"):
        parse_budget(text, 1_000_000, 77)
