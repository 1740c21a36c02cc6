"""The schema accepts our configs and refuses what the parser refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from jsonargparse import get_loader

from lora_lightning.cli.configs import config_names, find_config
from lora_lightning.cli.verbs.compare import arms_file

pytestmark = pytest.mark.slow  # a schema takes jsonargparse 7 s and more


def printed(*words):
    """What the verb prints, in a process of its own: runs make Lightning make classes that no schema can name."""
    line = [sys.executable, "-m", "lora_lightning", "schema", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(printed())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def read(text):
    return get_loader("yaml")(text)


@pytest.mark.parametrize("name", [name for name in config_names() if not arms_file(["--config", name])])
def test_our_configs_are_valid(name, validator):
    errors = list(validator.iter_errors(read(Path(find_config(name)).read_text())))
    assert not errors, [(list(error.absolute_path), error.message[:200]) for error in errors]


GOOD = [
    "trainer: {callbacks+: [SparsitySchedule, {class_path: KeepBest, init_args: {mode: max}}]}",
    "trainer: {callbacks: {class_path: lora_lightning.callbacks.sparsity.SparsitySchedule}}",
    "model: {method: {class_path: ll_rose.RoseLoRA}}",
    "model: {optimizer: {class_path: RiemannianAdamW, init_args: {lr: 0.1}}}",
    "model: {method: {class_path: LoRASC, init_args: {inner: {class_path: DoRA, init_args: {rank: 8}}}}}",
]
BAD = [
    "modle: {pretrained: x}",
    "model: {pretraind: x}",
    "model: {method: {class_path: LoRA, init_args: {rnak: 4}}}",
    "model: {method: {class_path: RosaLoRA}}",
    "model: {method: {class_path: LoRA, init_args: {rank: four}}}",
    "model: {optimizer: {class_path: AdamW, init_args: {params: []}}}",
    "model: {quantization: nf5}",
    "data: {class_path: LabelledText, init_args: {batch_sise: 4}}",
    "trainer: {max_step: 3}",
    "trainer: {callbacks: [KeepBst]}",
    "trainer: {callbacks: [{class_path: KeepBest, init_args: {mde: max}}]}",
    "trainer: {callbacks: [{class_path: SparsitySchedule, init_args: {sparsity: much}}]}",
    "trainer: {callbacks: [{class_path: RankPruning}]}",
    "trainer: {strategy: {class_path: FSDP2, init_args: {reshard: true}}}",
]


@pytest.mark.parametrize("text", GOOD)
def test_short_and_full_names_and_added_callbacks_are_valid(text, validator):
    assert validator.is_valid(read(text))


@pytest.mark.parametrize("text", BAD)
def test_mistakes_are_not(text, validator):
    assert not validator.is_valid(read(text))


def test_settings_have_their_documentation(validator):
    [rose] = [
        choice
        for choice in validator.schema["$defs"]["Method"]["anyOf"]
        if "RoseLoRA" in choice.get("properties", {}).get("class_path", {}).get("enum", ())
    ]
    rank = rose["properties"]["init_args"]["properties"]["rank"]
    assert rank["type"] == "integer"
    assert rank["default"] > 0
    assert len(rank["description"]) > 20
