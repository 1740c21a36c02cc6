from __future__ import annotations

import pytest
import yaml

from lora_lightning.cli.given_settings import given_settings, setting_of


def given(*words):
    return given_settings(words, yaml.safe_load)


def test_configs_and_flags_follow_one_another(tmp_path):
    config = tmp_path / "one.yaml"
    config.write_text(
        """
model:
  method: {class_path: One, init_args: {inner: {class_path: Two, init_args: {rank: 2}}, size: 3}}
  targets: [query, value]
trainer: {callbacks+: [{class_path: Three}]}
"""
    )
    flags = ["--model.method.init_args.size=4", "--trainer.max_steps", "5", "--trainer.callbacks+", "Four", "--last"]
    assert given("--config", str(config), *flags) == {
        "model.method": "One",
        "model.method.inner": "Two",
        "model.method.inner.rank": 2,
        "model.method.size": 4,
        "model.targets": ["query", "value"],
        "trainer.callbacks": "Four",
        "trainer.max_steps": 5,
        "last": "",
    } | {"last": None}
    assert given("--model.method.size", "1", f"--config={config}")["model.method.size"] == 3


@pytest.mark.parametrize("text", ["model: [", "a word", "- a list", ""])
def test_a_config_that_is_none_gives_nothing(tmp_path, text):
    (tmp_path / "none.yaml").write_text(text)
    assert given("--config", str(tmp_path / "none.yaml")) == {}


def test_yaml_itself_is_a_config_and_a_file_that_is_missing_is_nothing(tmp_path):
    assert given("--config", "{trainer: {max_steps: 3}}") == {"trainer.max_steps": 3}
    assert given("--config", str(tmp_path / "missing.yaml")) == {}


def test_the_setting_of_a_flag():
    assert setting_of("--trainer.callbacks+") == "trainer.callbacks"
    assert setting_of("--data.init_args.size") == "data.size"
