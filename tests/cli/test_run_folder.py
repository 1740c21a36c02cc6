import os

import pytest

from lora_lightning.cli import run_folder
from lora_lightning.errors import RunFolderError


def test_folders_are_numbered_and_told_to_children(tmp_path, monkeypatch):
    monkeypatch.delenv(run_folder.VARIABLE, raising=False)
    first = run_folder.new_folder("rose", tmp_path)
    assert first == tmp_path / "rose" / "001"
    assert os.environ[run_folder.VARIABLE] == str(first)
    assert run_folder.new_folder("rose", tmp_path) == first
    run_folder.forget()
    (tmp_path / "rose" / "007").mkdir()
    assert run_folder.new_folder("rose", tmp_path).name == "008"
    run_folder.forget()


def test_an_unwritable_place_for_runs(tmp_path, monkeypatch):
    monkeypatch.delenv(run_folder.VARIABLE, raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r'cannot make the run folder ".*file/rose/001": Not a directory'):
        run_folder.new_folder("rose", tmp_path / "file")


def test_metrics_are_kept_on_every_resume(tmp_path):
    for n in (1, 2):
        (tmp_path / "metrics.csv").write_text(str(n))
        run_folder.keep_metrics(tmp_path)
    assert [(tmp_path / f"metrics.{n}.csv").read_text() for n in (1, 2)] == ["1", "2"]
    run_folder.keep_metrics(tmp_path)
