from __future__ import annotations

import os
from pathlib import Path

import pytest
from adapter_files import adapted
from limits import small_files

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError
from lora_lightning.storage import atomic as files
from lora_lightning.storage.stored import FILE
from lora_lightning.testing import perturb


@pytest.mark.parametrize("size", [100, 1400])
def test_a_full_disk_leaves_the_old_adapter(folder: Path, size: int) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before[FILE]) > 1400
    model = adapted(name="default")
    perturb(model, 3)
    refusal = pytest.raises(AdapterFileError, match=r'cannot write the adapter to ".*": File too large. What was there')
    with refusal, small_files(size):
        ll.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(AdapterFileError, match="File too large"), small_files(size):
        ll.save_adapter(model, folder.parent / "new" / "deep")
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_the_description_that_cannot_be_written_keeps_the_old_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors come first; when the second file fails, the first must not have been replaced."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls, flush = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        flush(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(AdapterFileError, match=r"No space left on device\. What was there before is intact"):
        ll.save_adapter(adapted(method=LoRA(rank=1)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupt_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ll.save_adapter(adapted(method=LoRA(rank=1)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(AdapterFileError, match=r"cannot write the adapter to .*(exists|Not a directory)"):
            ll.save_adapter(adapted(), place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
