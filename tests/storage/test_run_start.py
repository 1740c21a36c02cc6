"""Paths of a run, looked up from other directories."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lora_lightning.storage.run_start import from_start, paths_from_start, run_start


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A function that makes a run folder below a start with a file; it goes to another directory."""

    def make(root=None, below="runs"):
        start = tmp_path / "start"
        run = start / below / "chat/001"
        (run / "adapter").mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"trainer": {"default_root_dir": root}}))
        (start / "a.jsonl").touch()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return run

    return make


@pytest.mark.parametrize(("root", "below"), [(None, "runs"), ("runs", "runs"), ("./out/here", "out/here"), (".", ".")])
def test_a_path_is_found_from_the_runs_start(started, root, below):
    run = started(root, below)
    start = run.parents[1 if below == "." else 1 + len(Path(below).parts)]
    for folder in (run, run / "adapter", Path("..", *run.parts[-(len(run.parts) - len(start.parent.parts)) :])):
        assert run_start(folder) == start
        assert from_start("a.jsonl", folder) == str(start / "a.jsonl")
    assert from_start("Qwen/Qwen3-0.6B", run) == "Qwen/Qwen3-0.6B"
    assert from_start(str(start / "b.jsonl"), run) == str(start / "b.jsonl")
    assert paths_from_start(["a.jsonl", "b"], run) == [str(start / "a.jsonl"), "b"]
    assert paths_from_start({"a.jsonl": 2, "b": 1}, run) == {str(start / "a.jsonl"): 2, "b": 1}
    assert paths_from_start(None, run) is None
    for name in (f"random:llava:0:{'x' * 500}", "x" * 5000, "a\nb", "a\0b", "~nobody-here/x"):
        assert from_start(name, run) == name
    Path("a.jsonl").touch()
    assert from_start("a.jsonl", run) == "a.jsonl"  # what lies here wins


def test_a_start_that_was_moved_with_its_runs(started, tmp_path):
    run = started()
    shutil.move(tmp_path / "start", tmp_path / "moved")
    run = tmp_path / "moved" / run.relative_to(tmp_path / "start")
    assert from_start("a.jsonl", run) == str(tmp_path / "moved/a.jsonl")


@pytest.mark.parametrize("root", ["/abs", "other", "a/b"])
def test_a_run_that_does_not_tell_where_it_was_started(started, root):
    assert run_start(started(root)) is None


def test_folders_that_are_no_run(tmp_path):
    assert run_start(tmp_path) is None
    for text in ("", "a: [", "trainer: 3", "[1]", "trainer: {default_root_dir: 3}"):
        (tmp_path / "config.yaml").write_text(text)
        assert run_start(tmp_path) is None
    assert from_start("x", tmp_path) == "x"
