from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_lightning.errors import AdapterFileError
from lora_lightning.storage.inside import names_inside, read_inside, shortened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, beside a private file and a private folder."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_text("text")
    (tmp_path / "folder" / "inner" / ".hidden").write_text("x")
    (tmp_path / "folder" / "inner" / "deeper").mkdir()
    return tmp_path / "folder"


def test_files_inside_are_read_through_links_to_the_folder_and_in_it(folder: Path) -> None:
    (folder / "inner" / "link").symlink_to("file")
    (folder.parent / "way").symlink_to(folder)
    assert names_inside(folder, "inner") == ["file", "link"]
    assert names_inside(folder, "nothing") == []
    for where in (folder, folder.parent / "way"):
        assert read_inside(where, "inner/file") == read_inside(where, "inner/link") == b"text"


@pytest.mark.parametrize(
    "target", [lambda f: f.parent / "private" / "key", lambda _: Path("../../private/key"), lambda f: f.parent / "hop"]
)
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, target: Callable[[Path], Path]) -> None:
    (folder.parent / "hop").symlink_to(folder.parent / "private" / "key")
    (folder / "inner" / "merges.txt").symlink_to(target(folder))
    with pytest.raises(AdapterFileError, match=r'inner/merges.txt" is a link out of its folder, to ".*private/key"'):
        read_inside(folder, "inner/merges.txt")


def test_a_folder_that_is_a_link_out_is_not_followed(folder: Path) -> None:
    (folder / "tokenizer").symlink_to(folder.parent / "private")
    said = r'folder/tokenizer(/key)?" is a link out of its folder, to ".*private'
    with pytest.raises(AdapterFileError, match=said):
        names_inside(folder, "tokenizer")
    with pytest.raises(AdapterFileError, match=said):
        read_inside(folder, "tokenizer/key")


def test_what_is_no_file_is_refused_and_nobody_waits_for_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "round").symlink_to("round")
    (folder / "dangling").symlink_to(folder / "nothing")
    for name in ("pipe", "inner", "round", "dangling", "nothing", "inner/file/x", "null\0"):
        with pytest.raises(AdapterFileError, match=r'" cannot be read: '):
            read_inside(folder, name)


def test_a_snapshot_of_the_hugging_face_cache_is_links_to_blobs_beside_it(folder: Path) -> None:
    repository = folder.parent / "models--me--adapter"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab").write_text("blob")
    (snapshot / "adapter.json").symlink_to("../../blobs/ab")
    assert read_inside(snapshot, "adapter.json") == b"blob"
    (snapshot / "other").symlink_to(folder.parent / "private" / "key")
    with pytest.raises(AdapterFileError, match="is a link out of its folder"):
        read_inside(snapshot, "other")
    (repository / "blobs" / "ab").unlink()
    (repository / "blobs").rmdir()
    (repository / "blobs").symlink_to(folder.parent / "private")
    (snapshot / "planted").symlink_to("../../blobs/key")
    with pytest.raises(AdapterFileError, match="is a link out of its folder"):
        read_inside(snapshot, "planted")


def test_a_path_is_shown_as_seen_from_a_folder_that_it_lies_in(tmp_path: Path) -> None:
    assert shortened(tmp_path / "runs" / "001", tmp_path) == Path("runs/001")
    assert shortened(tmp_path / "runs", tmp_path / "elsewhere") == tmp_path / "runs"
