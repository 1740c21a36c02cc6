import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_lightning.cli.main import main
from lora_lightning.cli.verbs.export import adapter_folder
from lora_lightning.errors import RunFolderError

NOTHING = {"rank": None, "pretrained": None, "server": None, "dtype": None, "quantize": None}


@pytest.fixture
def calls(monkeypatch):
    """What `export_folder` is called with."""
    seen = []

    def export_folder(adapter, output, format, **options):
        seen.append((adapter, output, format, options))
        return f"written: {output}"

    monkeypatch.setitem(
        sys.modules, "lora_lightning.exporters.from_folder", SimpleNamespace(export_folder=export_folder)
    )
    return seen


def test_a_run_folder_means_its_adapter(calls, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    words = ["export", str(tmp_path), "--format", "peft", "--output", "out", "--rank", "4", "--pretrained", "base"]
    assert main(words) == 0
    assert calls == [(tmp_path / "adapter", Path("out"), "peft", NOTHING | {"rank": 4, "pretrained": "base"})]
    assert capsys.readouterr().out == "written: out\n"


def test_any_other_folder_is_taken_for_an_adapter(calls, tmp_path):
    words = ["export", str(tmp_path), "--output=out"]
    assert main([*words, "--format=merged", "--dtype=bfloat16", "--quantize=nf4"]) == 0
    assert main([*words, "--for=vllm"]) == 0
    assert calls == [
        (tmp_path, Path("out"), "merged", NOTHING | {"dtype": "bfloat16", "quantize": "nf4"}),
        (tmp_path, Path("out"), None, NOTHING | {"server": "vllm"}),
    ]


def test_neither_a_format_nor_a_server(calls, tmp_path, capsys):
    assert main(["export", str(tmp_path), "--output=out"]) == 2
    assert "--format or --for is needed" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--output=out", "--format=peft", "--private"]) == 2
    assert "--private says nothing without --push" in capsys.readouterr().err
    assert not calls


def test_nothing_is_exported_that_could_not_be_pushed(calls, tmp_path, capsys):
    assert main(["export", str(tmp_path), "--output=out", "--format=peft", "--push=no name"]) == 2
    assert "it must be OWNER/NAME" in capsys.readouterr().err
    assert not calls


def test_a_run_that_has_not_finished(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(
        RunFolderError, match=r"has no adapter/, which a fit writes when it has finished\. Continue it with"
    ):
        adapter_folder(tmp_path)
