"""What lies below is found by the digest of its files; `tests/training/test_start.py` trains on top."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import adapted

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError
from lora_lightning.injection.records import Below, records, stack_of, stand_on
from lora_lightning.storage.below import find_below
from lora_lightning.storage.stored import read_folder
from lora_lightning.testing import TinyMLP


def test_one_below_is_found_under_any_name_and_asked_for_by_its_own(tmp_path: Path) -> None:
    low = ll.save_adapter(adapted(), tmp_path / "low")
    model = TinyMLP()
    ll.load_adapter(model, low, "low")
    ll.inject(model, records(model)["low"].method, name="default", seed=3)
    stand_on(model, "default", [Below("low", records(model)["low"].digest or "", str(low))])
    assert stack_of(model, "default") == ("low", "default")
    stored = read_folder(ll.save_adapter(model, tmp_path / "top"))
    fresh = TinyMLP()
    with pytest.raises(
        AdapterFileError, match=rf'was trained on top of "{low}" \(sha256 {stored.below[0]["digest"][:12]}\)'
    ):
        find_below(fresh, stored, "top")
    ll.load_adapter(fresh, low, "other")
    assert [one.name for one in find_below(fresh, stored, "top")] == ["other"]
    ll.set_trainable(fresh, "other")  # it is about to be another one
    with pytest.raises(AdapterFileError, match="and says nothing without"):
        find_below(fresh, stored, "top")
