from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported_models import adapted, llama, randomise
from file_steps import each_step

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters import folder
from lora_lightning.exporters.folder import finish_interrupted, write_folder
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


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


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


def write(folder: Path, text: str) -> None:
    def fill(beside: Path) -> None:
        for name in ("a", "b"):
            (beside / name).write_text(text)

    write_folder(folder, fill)


def test_a_kill_at_any_step_leaves_the_old_or_the_new_folder_and_the_next_call_puts_it_in_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a moment the earlier folder only stands beside its place; after a kill then, something has to say so."""
    target, found, absent = tmp_path / "out", set(), 0
    old, new = ({name: text.encode() for name in ("a", "b")} for text in ("old", "new"))

    def prepare() -> None:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        target.mkdir()
        for name in old:
            (target / name).write_text("old")
        capsys.readouterr()

    for number, step in each_step(lambda: write(target, "new"), prepare):
        gone, leftovers = not target.exists(), len(list(tmp_path.iterdir())) > (not target.exists()) ^ 1
        finish_interrupted(target)
        assert content(target) in (old, new), f"step {number}: {step}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        said = capsys.readouterr().out
        assert (f'"{target}": an export that was interrupted is undone; the one from before is there' in said) == gone
        assert ("what an interrupted export had left beside it is removed" in said) or gone or not leftovers
        found.add(content(target) == new)
        absent += gone
        write(target, "third")
        assert set(content(target).values()) == {b"third"}
    assert found == {True, False}
    assert absent
    assert content(target) == new


@pytest.mark.parametrize("call", [lambda out: ll.import_peft(llama(), out), lambda out: ll.export(adapted(), out)])
@pytest.mark.parametrize("name", [".out.replaced", ".out.0123456789abcdef.replaced"])
def test_reading_and_writing_put_an_earlier_export_back(
    name: str, call: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first name is that of version 0.1."""
    ll.export(adapted(), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / name)
    capsys.readouterr()
    call(tmp_path / "out")
    assert "an export that was interrupted is undone; the one from before is there" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_is_being_written_and_planted_links_are_nobodys_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    links = [
        tmp_path / f".out{middle}{ending}" for middle in ("", f".{'0' * 16}") for ending in (".writing", ".replaced")
    ]
    for link in links:
        link.symlink_to(tmp_path / "private")

    def fill(beside: Path) -> None:
        write(target, "other")
        (beside / "a").write_text("mine")

    write_folder(target, fill)
    assert content(target) == {"a": b"mine"}
    assert (tmp_path / "private" / "key").read_text() == "secret"
    assert all(link.is_symlink() for link in links)
    for link in links:
        link.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "private"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ll.export(adapted(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").is_file()
