"""Numbers of run folders, who holds one, and what a refused fit leaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning.cli import run_folder
from lora_lightning.cli.run_folder import LOCK, VARIABLE, Lock, RunFolder
from lora_lightning.errors import RunFolderError


@pytest.fixture(autouse=True)
def _no_run(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    os.environ.pop(VARIABLE, None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_are_numbered_and_told_to_children(tmp_path):
    run = RunFolder()
    assert run.begin("rose", tmp_path) == tmp_path / "rose" / "001"
    assert os.environ[VARIABLE] == str(run.path)
    assert RunFolder().begin("rose", tmp_path, rank=1) == run.path
    run.close(refused=True)
    assert VARIABLE not in os.environ
    assert not (tmp_path / "rose").exists()
    (tmp_path / "rose" / "007").mkdir(parents=True)
    assert RunFolder().begin("rose", tmp_path).name == "008"


def test_a_process_that_another_launcher_started_makes_no_folder(tmp_path):
    assert RunFolder().begin("rose", tmp_path, rank=1) == tmp_path / "rose" / "pending"
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_for_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r'cannot make the run folder ".*file/rose/001": Not a directory'):
        RunFolder().begin("rose", tmp_path / "file")


@pytest.mark.parametrize("there", ["summary.json", "last.ckpt", "config.yaml", "adapter/adapter.json"])
def test_a_variable_that_names_a_run_is_refused(tmp_path, monkeypatch, there):
    """It is how launched processes are told; set by hand it would replace what the run has left."""
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("old")
    before = contents(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    run = RunFolder()
    with pytest.raises(RunFolderError, match=rf"LORA_LIGHTNING_RUN=.*has left {there[:7]}.* Unset it, or go on with"):
        run.begin("rose", tmp_path)
    run.close(refused=True)
    assert contents(tmp_path) == before


def test_a_variable_that_names_a_free_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    run = RunFolder()
    assert run.begin("rose", tmp_path) == tmp_path / "mine"
    (tmp_path / "mine" / "config.yaml").write_text("a: 1")
    run.started = True
    run.close(refused=True)
    assert contents(tmp_path) == {"mine/config.yaml": b"a: 1"}


@pytest.mark.parametrize("refused", [True, False])
def test_a_fit_that_is_refused_before_it_starts_leaves_nothing(tmp_path, refused):
    run = RunFolder()
    folder = run.begin("rose", tmp_path / "runs")
    (folder / "events.out.tfevents.1").write_text("x")
    (folder / "checkpoints").mkdir()
    run.close(refused)
    assert (tmp_path / "runs").exists() != refused
    assert not list(tmp_path.rglob(LOCK))


def test_a_refused_fit_leaves_what_was_in_a_folder_that_the_variable_names(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    (mine / "numbers.json").write_text("{}")
    monkeypatch.setenv(VARIABLE, str(mine))
    run = RunFolder()
    folder = run.begin("rose", tmp_path / "runs")
    (folder / "new.csv").write_text("x")
    run.close(refused=True)
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"notes.txt": "keep me", "numbers.json": "{}"}


def test_a_resume_that_is_refused_changes_no_byte(tmp_path):
    for name in ("config.yaml", "metrics.csv", "summary.json", "last.ckpt", "events.out.tfevents.1"):
        (tmp_path / name).write_text(f"old {name}")
    before = contents(tmp_path)
    run = RunFolder()
    run.resume(tmp_path)
    assert (tmp_path / "metrics.1.csv").is_file()
    (tmp_path / "config.yaml").write_text("refused")
    (tmp_path / "metrics.csv").write_text("")
    (tmp_path / "summary.json").unlink()
    (tmp_path / "events.out.tfevents.2").write_text("")
    (tmp_path / "checkpoints").mkdir()
    run.close(refused=True)
    assert contents(tmp_path) == before
    assert not (tmp_path / "checkpoints").exists()


def test_a_resumed_run_that_has_started_keeps_what_it_wrote(tmp_path):
    (tmp_path / "config.yaml").write_text("old")
    run = RunFolder()
    run.resume(tmp_path)
    (tmp_path / "config.yaml").write_text("new")
    run.started = True
    run.close(refused=True)
    assert contents(tmp_path) == {"config.yaml": b"new"}


def test_metrics_are_kept_on_every_resume(tmp_path):
    for n in (1, 2):
        (tmp_path / "metrics.csv").write_text(str(n))
        run_folder.keep_metrics(tmp_path)
    assert [(tmp_path / f"metrics.{n}.csv").read_text() for n in (1, 2)] == ["1", "2"]
    run_folder.keep_metrics(tmp_path)


HOLDING = """
import sys
from pathlib import Path
from lora_lightning.cli.run_folder import Lock
Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path):
    words = [sys.executable, "-c", HOLDING, str(tmp_path / LOCK)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    run = RunFolder()
    with pytest.raises(RunFolderError, match=rf"process {other.pid} on .* is training in this run folder\. Wait until"):
        run.resume(tmp_path)
    run.close(refused=True)
    assert (tmp_path / LOCK).exists()  # the other's
    other.kill()
    other.communicate()
    run.resume(tmp_path)
    run.close(refused=False)
    assert not (tmp_path / LOCK).exists()


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path):
    lock = Lock(tmp_path / LOCK)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        Lock(tmp_path / LOCK)
    lock.release()
    Lock(tmp_path / LOCK).release()


def test_a_lock_that_only_children_of_a_dead_process_hold_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphaned = Lock(tmp_path / LOCK)  # as a forked worker holds its parent's
    (tmp_path / LOCK).write_text(json.dumps({"pid": dead.pid, "host": socket.gethostname()}))
    lock = Lock(tmp_path / LOCK)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    os.close(orphaned._handle)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "host": "elsewhere"}'])
def test_a_lock_that_says_little_counts_as_held(tmp_path, text):
    lock = Lock(tmp_path / LOCK)
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(RunFolderError, match="is training in this run folder"):
        Lock(tmp_path / LOCK)
    lock.release()


def test_a_lock_left_behind_by_nobody_is_free(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere"}')
    Lock(tmp_path / LOCK).release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", unsupported)
    Lock(tmp_path / LOCK).release()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(RunFolderError, match=r'cannot write into the run folder ".*gone": No such file'):
        Lock(tmp_path / "gone" / LOCK)
