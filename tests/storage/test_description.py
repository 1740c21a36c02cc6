"""The description of an adapter, also as 0.1 wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_files import METHOD, adapted

import lora_lightning as ll
from lora_lightning.methods import replace
from lora_lightning.models.anatomy import survey
from lora_lightning.storage.description import SCHEMA, describe_adapter, described_formats
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.storage.stored import read_folder
from lora_lightning.testing import tiny_encoder

OLD = Path(__file__).parents[1] / "old_files"


def test_it_says_what_was_injected_and_into_what() -> None:
    model = adapted(overrides={"first": {"rank": 1}})
    found = describe_adapter(survey(model), "default")
    assert (found["schema_version"], found["method"], found["seed"]) == (SCHEMA, "LoRA", 0)
    assert found["layers"] == {"first": {"rank": 1}, "second": {}}
    assert found["settings"]["rank"] == METHOD.rank
    assert found["fingerprint"] == fingerprint(survey(model))
    assert found["quantization"] is None
    assert json.loads(json.dumps(found)) == found


def test_labels_go_with_trained_heads_only() -> None:
    model = tiny_encoder()
    model.config.id2label = {1: "bad", 0: "good", 2: "ugly"}
    ll.inject(model, METHOD, name="with", seed=0)
    ll.inject(model, replace(METHOD, "test", {}), name="without", also_train=[], seed=0)
    assert describe_adapter(survey(model), "with")["labels"] == ["good", "bad", "ugly"]
    assert describe_adapter(survey(model), "without")["labels"] is None


@pytest.mark.parametrize(
    ("description", "formats"),
    [({}, None), ({"quantization": "nf4"}, "nf4"), ({"quantisation": "int8"}, "int8"), ({"quantisation": None}, None)],
)
def test_the_key_of_formats_in_every_version(description: dict[str, str], formats: str | None) -> None:
    assert described_formats(description) == formats


@pytest.mark.parametrize("folder", sorted(OLD.rglob("adapter.safetensors")), ids=lambda path: path.parent.parent.name)
def test_folders_of_0_1_are_read(folder: Path) -> None:
    stored = read_folder(folder.parent)
    description = json.loads((folder.parent / "adapter.json").read_text())
    assert "quantisation" in description
    assert stored.quantization is None
    assert stored.tensors
    assert (stored.method, stored.seed) == (description["method"], description["seed"])
