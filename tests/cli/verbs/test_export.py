import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_lightning.cli.main import main
from lora_lightning.cli.verbs.export import adapter_folder
from lora_lightning.errors import RunFolderError


@pytest.fixture
def calls(monkeypatch):
    """What `export_folder` is called with."""
    seen = []

    def export_folder(adapter, output, format, rank=None, pretrained=None):
        seen.append((adapter, output, format, rank, pretrained))
        return f"written: {output}"

    monkeypatch.setitem(
        sys.modules, "lora_lightning.exporters.from_folder", SimpleNamespace(export_folder=export_folder)
    )
    return seen


def test_a_run_folder_means_its_adapter(calls, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    words = ["export", str(tmp_path), "--format", "peft", "--output", "out", "--rank", "4", "--pretrained", "base"]
    assert main(words) == 0
    assert calls == [(tmp_path / "adapter", Path("out"), "peft", 4, "base")]
    assert capsys.readouterr().out == "written: out\n"


def test_any_other_folder_is_taken_for_an_adapter(calls, tmp_path):
    assert main(["export", str(tmp_path), "--format=merged", "--output=out"]) == 0
    assert calls == [(tmp_path, Path("out"), "merged", None, None)]


def test_a_run_that_has_not_finished(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(
        RunFolderError, match=r"has no adapter/, which a fit writes when it has finished\. Continue it with"
    ):
        adapter_folder(tmp_path)
