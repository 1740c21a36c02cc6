from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from file_steps import STEPS, Stopped, each_step

from lora_lightning.errors import AdapterFileError
from lora_lightning.storage import commit
from lora_lightning.storage.atomic import named_beside
from lora_lightning.storage.commit import Layout, replace_files, settled

LAYOUT = Layout("main", "notes", "parts")
OLD = {"main": b"old", "notes": b"old notes", "parts/a": b"old a", "parts/b": b"old b"}
NEW = {"parts/c": b"new c", "main": b"new", "notes": b"new notes", "parts/a": b"new a"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save(folder: Path, files: dict[str, bytes] = NEW, check: Any = lambda _: None) -> None:
    replace_files(folder, LAYOUT, files, check, belonging)


def belonging(folder: Path) -> list[str]:
    main = folder / "main"
    return sorted((OLD if main.exists() and main.read_bytes() == b"old" else NEW).keys() - {"main"})


def put(folder: Path, files: dict[str, bytes] = OLD) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)


def seen(folder: Path) -> dict[str, bytes]:
    """What a reader finds."""
    with settled(folder, LAYOUT):
        return content(folder)


def test_files_are_replaced_and_those_without_a_successor_go(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"
    save(folder, OLD)
    assert content(folder) == OLD
    (folder / "mine").write_text("x")
    (folder / "parts" / "mine").write_text("x")
    save(folder)
    assert content(folder) == {**NEW, "mine": b"x", "parts/mine": b"x"}
    (folder / "parts" / "mine").unlink()
    save(folder, {"main": b"last", "notes": b"last"})
    assert sorted(path.name for path in folder.iterdir()) == ["main", "mine", "notes"]


@pytest.mark.parametrize("after", ["a reader", "a writer"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_files_and_the_next_call_says_which(
    after: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = tmp_path / "folder", set()
    for number, step in each_step(lambda: save(folder), lambda: put(folder)):
        half = content(folder)
        if after == "a reader":
            there = seen(folder)
            assert there in (OLD, NEW), f"step {number}: {step}"
            said = capsys.readouterr().out
            if half != there:
                word = "completed; the new adapter is there" if there == NEW else "undone; the adapter from before"
                assert f'"{folder}": a save that was interrupted is {word}' in said
            found.add(there == NEW)
        save(folder, {"main": b"third", "notes": b"third"})
        assert content(folder) == {"main": b"third", "notes": b"third"}, f"step {number}: {step}"
        capsys.readouterr()
    assert content(folder) == NEW
    if after == "a reader":
        assert found == {True, False}


def test_a_kill_at_any_step_of_completing_or_undoing_is_made_good_by_the_next(tmp_path: Path) -> None:
    folder, kept = tmp_path / "folder", tmp_path / "kept"
    halves = []
    for number, _ in each_step(lambda: save(folder), lambda: put(folder)):
        shutil.copytree(folder, kept / str(number))
        halves.append(kept / str(number))

    def back(half: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(half, folder)

    for half in halves[:: max(1, len(halves) // 12)]:
        for number, step in each_step(lambda: seen(folder), lambda half=half: back(half)):  # type: ignore[misc]
            assert seen(folder) in (OLD, NEW), f"{half.name}, step {number}: {step}"


@pytest.mark.slow
def test_a_real_kill_at_any_step(tmp_path: Path) -> None:
    """The same with SIGKILL in a process of its own, whose locks the system gives back."""
    folder = tmp_path / "folder"
    for number in range(1, 200):
        put(folder)
        child = os.fork()
        if child == 0:
            _killed_at(number, lambda: save(folder))
        _, status = os.waitpid(child, 0)
        assert seen(folder) in (OLD, NEW)
        if os.WIFEXITED(status):
            break
    assert number > 20
    assert content(folder) == NEW


def _killed_at(number: int, run: Any) -> None:
    left = number

    def step(real: Any) -> Any:
        def taken(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return taken

    for name in STEPS:
        setattr(os, name, step(getattr(os, name)))
    run()
    os._exit(0)


def test_an_error_before_the_commit_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder)

    def check(staged: Path) -> None:
        assert content(staged) == NEW, "the new version is whole, and on the disk"
        raise AdapterFileError("not good")

    with pytest.raises(AdapterFileError, match="not good"):
        save(folder, check=check)
    assert content(folder) == OLD
    with pytest.raises(AdapterFileError, match="not good"):
        save(tmp_path / "a" / "b", check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_after_the_commit_is_said_and_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    put(folder)
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name == "notes":
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(AdapterFileError, match="new adapter counts, but No space left"):
            save(folder)
    assert seen(folder) == NEW
    assert "is completed; the new adapter is there" in capsys.readouterr().out


def test_a_version_that_is_being_written_is_nobodys_leftover(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder)

    def meanwhile(staged: Path) -> None:
        assert seen(folder) == {**OLD, **{f"{staged.name}/{name}": value for name, value in NEW.items()}}
        save(folder, {"main": b"other", "notes": b"other"})
        assert staged.is_dir()

    save(folder, check=meanwhile)
    assert content(folder) == NEW


def test_many_writers_of_one_folder_never_mix(tmp_path: Path) -> None:
    folder, errors = tmp_path / "folder", []

    def write(number: int) -> None:
        value = str(number).encode()
        try:
            for _ in range(5):
                replace_files(
                    folder,
                    LAYOUT,
                    dict.fromkeys(NEW, value),
                    lambda _: None,
                    lambda there: [str(p.relative_to(there)) for p in there.glob("parts/*")],
                )
                with settled(folder, LAYOUT):
                    values = {(folder / name).read_bytes() for name in NEW}
                assert len(values) == 1
        except BaseException as error:  # an error in a thread would be lost
            errors.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert content(folder).keys() == NEW.keys()


def test_what_is_in_the_way_is_refused_before_anything_changes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (tmp_path / "elsewhere").mkdir()
    put(folder, {"main": b"old", "notes": b"old notes"})
    (folder / "parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFileError, match=r'parts" is a link; remove it first'):
        save(folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (folder / "parts").unlink()
    (folder / "parts").write_text("x")
    with pytest.raises(AdapterFileError, match=r'parts" is a file; remove it first'):
        save(folder)
    (folder / "parts").unlink()
    (folder / "notes").unlink()
    (folder / "notes").mkdir()
    with pytest.raises(AdapterFileError, match=r'notes" is a folder, where a file is to be'):
        save(folder)
    assert (folder / "main").read_bytes() == b"old"
    assert sorted(path.name for path in folder.iterdir()) == ["main", "notes"]


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder)
    (tmp_path / "private").write_text("mine")
    for name in ("main", "notes", "parts/a"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "private")
    save(folder)
    assert content(folder).items() >= NEW.items()
    assert (tmp_path / "private").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "parts/../../out", "parts/..", "other", "main", "parts/a/b", ""]
)
@pytest.mark.parametrize("what", ["move", "remove"])
def test_a_plan_from_elsewhere_reaches_nothing_outside(what: str, name: str, tmp_path: Path) -> None:
    """A folder of a stranger may hold what looks like an interrupted save."""
    folder = tmp_path / "folder"
    put(folder, NEW)
    (tmp_path / "out").write_text("mine")
    beside = named_beside(folder / "main", ".saving")
    beside.mkdir()
    plan = {"commit": commit.digest(NEW["main"]), "move": [], "remove": [], what: [name]}
    (beside / "plan.json").write_bytes(commit.as_json(plan))
    with pytest.raises(
        AdapterFileError, match=r"a save was interrupted, and completing it fails: .* is no file of such"
    ):
        seen(folder)
    assert (tmp_path / "out").read_text() == "mine"
    assert content(folder).items() >= NEW.items()


def test_a_planted_link_with_the_name_of_a_leftover_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    planted = named_beside(folder / "main", ".saving")
    planted.symlink_to(tmp_path / "private")
    save(folder)
    with settled(folder, LAYOUT):
        assert planted.is_symlink()
    assert (tmp_path / "private" / "key").read_text() == "secret"


def test_without_locks_files_are_replaced_and_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none; then nobody can tell a leftover from what is being written."""

    def none(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    folder = tmp_path / "folder"
    put(folder)
    leftover = named_beside(folder / "main", ".saving")
    leftover.mkdir()
    save(folder)
    assert leftover.is_dir()
    leftover.rmdir()
    assert content(folder) == NEW


def test_stops_are_no_errors_that_code_could_catch() -> None:
    assert not issubclass(Stopped, Exception)
