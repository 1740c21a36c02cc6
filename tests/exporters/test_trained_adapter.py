"""Adapters by their names; `tests/training/test_start.py` loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import adapted

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.exporters.trained_adapter import OURS, find_adapter
from lora_lightning.injection.records import meant_to_train, records
from lora_lightning.testing import TinyMLP


def test_what_a_folder_says_without_a_model(tmp_path: Path) -> None:
    folder = ll.save_adapter(adapted(), tmp_path / "run" / "adapter")
    found = find_adapter(str(tmp_path / "run"))
    assert (found.folder, found.format, found.labels, found.new_tokens) == (folder, OURS, [], ())
    assert found.source == str(folder.absolute())
    assert found.digest == find_adapter(str(folder)).digest
    assert str(found) == f'"{tmp_path / "run"}" (LoRA, lora_lightning, sha256 {found.digest[:12]})'


def test_an_adapter_is_known_by_its_files_until_it_trains(tmp_path: Path) -> None:
    found = find_adapter(str(ll.save_adapter(adapted(), tmp_path)))
    model = TinyMLP()
    found.load(model, "it")
    assert records(model)["it"].digest == found.digest
    assert meant_to_train(model) == ()
    ll.set_trainable(model, "it")
    assert records(model)["it"].digest is None


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r'the adapter is ".*", which holds neither adapter.safetensors nor'):
        find_adapter(str(tmp_path))
