from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from adapter_files import adapted
from file_steps import each_step
from limits import small_files

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import AdapterFileError
from lora_lightning.storage import atomic as files
from lora_lightning.storage.atomic import named_beside, read_regular, write_atomically
from lora_lightning.storage.stored import DESCRIPTION, FILE
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


# -- names and locks ---------------------------------------------------------------------------------------------------


def test_a_planted_link_with_a_temporary_name_is_neither_followed_nor_overwritten(folder: Path, tmp_path: Path) -> None:
    """Version 0.1 wrote to `.NAME.writing`, which anyone who may write the folder could have planted."""
    (tmp_path / "private").write_text("mine")
    names = [f".{name}{ending}" for name in (FILE, DESCRIPTION) for ending in (".writing", f".{'0' * 16}.writing")]
    for name in names:
        (folder / name).symlink_to(tmp_path / "private")
    ll.save_adapter(adapted(method=LoRA(rank=1)), folder)
    write_atomically(folder / FILE, lambda file: file.write(b"new"))
    assert (tmp_path / "private").read_text() == "mine"
    assert all((folder / name).is_symlink() for name in names)
    assert (folder / FILE).read_bytes() == b"new"


def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "private")
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "private").read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    def outer(file: BinaryIO) -> None:
        file.write(b"outer" * 1000)
        write_atomically(tmp_path / "file", lambda other: other.write(b"inner"))
        assert (tmp_path / "file").read_bytes() == b"inner"
        file.write(b"outer" * 1000)

    write_atomically(tmp_path / "file", outer)
    assert (tmp_path / "file").read_bytes() == b"outer" * 2000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_removed_and_said_and_what_is_being_written_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.ckpt"
    for number, _ in each_step(lambda: write_atomically(path, lambda file: file.write(b"half")), lambda: None):
        left = [other for other in tmp_path.iterdir() if other != path]
        assert len(left) <= 1
        capsys.readouterr()
        write_atomically(path, lambda file, n=number: file.write(b"%d" % n))  # type: ignore[misc]
        assert [other.name for other in tmp_path.iterdir()] == ["last.ckpt"]
        said = f'note: "{path}": what an interrupted write had left beside it is removed'
        assert (said in capsys.readouterr().out) == bool(left)
        assert path.read_bytes() == b"%d" % number


@pytest.mark.parametrize("name", [".a.b.writing", ".a.0123.writing", ".b.0123456789abcdef.writing", "a.writing"])
def test_files_that_only_look_alike_are_nobodys(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / name).read_text() == "mine"


def test_without_locks_a_file_is_written_and_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    left = named_beside(tmp_path / "file", ".writing")
    left.write_text("perhaps another process writes this")
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"
    assert left.exists()


def test_a_pipe_or_a_link_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("x")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=r"regular file|symbolic links"):
            read_regular(tmp_path / name)
    assert read_regular(tmp_path / "file") == b"x"
