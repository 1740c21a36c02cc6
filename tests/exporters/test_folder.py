from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from exported_models import adapted, randomise

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters import folder
from lora_lightning.exporters.peft import write as peft_export


def test_only_our_own_exports_are_replaced(tmp_path: Path) -> None:
    model = adapted()
    target = tmp_path / "out"
    target.mkdir()
    ll.export(model, target)
    first = (target / "adapter_model.safetensors").read_bytes()
    randomise(model.model.layers[0].self_attn.q_proj.adapters)
    ll.export(model, target, format="merged")
    assert "config.json" in {path.name for path in target.iterdir()}
    assert not (target / "adapter_model.safetensors").exists()
    assert first
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match=r"holds tokenizer\.json too, which a new one would delete"):
        ll.export(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    model = adapted()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds 1 files that are no export of ours, such as notes\.txt"):
        ll.export(model, tmp_path)
    with pytest.raises(ExportError, match="is a file"):
        ll.export(model, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("stage", ["save_file", "flush", "rename"])
def test_a_failure_leaves_the_old_export(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    ll.export(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    real = Path.rename

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_second(self: Path, to: Path) -> Path:
        return fail() if self.name.endswith(".writing") else real(self, to)

    if stage == "save_file":
        monkeypatch.setattr(peft_export, "save_file", fail)
    elif stage == "flush":
        monkeypatch.setattr(folder, "flush", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(ExportError, match=r"No space left on device\. What was there before is intact"):
        ll.export(randomise(model), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "half").write_text("x")
    ll.export(adapted(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ll.export(adapted(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").is_file()
