from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from lora_lightning.cli.answers.sampling import Sampling, add_sampling_arguments, sampling_of
from lora_lightning.errors import SettingsError


def config(sampling: Sampling, **own: Any) -> GenerationConfig:
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=7, **own))
    tokenizer = SimpleNamespace(pad_token_id=3, eos_token_id=2, chat_template=None, all_special_ids=[])
    tokenizer.added_tokens_decoder = {}

    class Callable(SimpleNamespace):
        def __call__(self, *_: Any, **__: Any) -> dict[str, list[int]]:
            return {"input_ids": []}

    found: GenerationConfig = sampling.config(model, Callable(**vars(tokenizer)), "stop")
    return found


def test_the_models_own_settings_hold_where_none_is_given() -> None:
    found = config(Sampling(), do_sample=True, temperature=0.6, top_p=0.9)
    assert (found.do_sample, found.temperature, found.top_p, found.max_new_tokens) == (True, 0.6, 0.9, 256)
    assert (found.eos_token_id, found.pad_token_id, found.stop_strings) == ([7, 2], 3, ["stop"])
    assert config(Sampling()).do_sample is False


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(temperature=0)])
def test_greedy_draws_nothing_whatever_the_model_says(sampling: Sampling) -> None:
    found = config(sampling, do_sample=True, temperature=0.6, top_k=5)
    assert (found.do_sample, found.temperature, found.top_k) == (False, 1.0, 50)


def test_a_value_draws_though_the_model_would_not() -> None:
    found = config(Sampling(temperature=0.5, top_k=3))
    assert (found.do_sample, found.temperature, found.top_k) == (True, 0.5, 3)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0)]
)
def test_values_outside_their_rules(field: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{field} is {value}; it must"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_settings_by_name_and_from_flags() -> None:
    sampling = Sampling().replaced("temperature", "0.5").replaced("greedy", "on").replaced("seed", "4")
    assert sampling == Sampling(temperature=0.5, greedy=True, seed=4)
    assert sampling.replaced("temperature", "null").temperature is None
    with pytest.raises(SettingsError, match=r'there is no setting "temprature". Did you mean "temperature"'):
        sampling.replaced("temprature", "1")
    with pytest.raises(SettingsError, match=r'top_k is "many"; it must be a number'):
        sampling.replaced("top_k", "many")
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    assert sampling_of(parser.parse_args(["--top_p", "0.5", "--seed", "3"])) == Sampling(top_p=0.5, seed=3)
