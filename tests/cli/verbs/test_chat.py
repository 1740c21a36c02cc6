from __future__ import annotations

import io
from pathlib import Path

import pytest
from toy_runs import decoder_folder

from lora_lightning.cli.main import main


def test_a_piped_chat_with_the_bare_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = decoder_folder(tmp_path / "decoder")
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n/exit\nw7\n"))
    assert main(["chat", str(base), "--greedy", "--max_new_tokens", "3", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert "[base answers: it has no chat template" in shown.err
    assert "[3 tokens, " in shown.err


def test_what_cannot_be_talked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path)]) == 2
    assert "holds neither adapter.safetensors nor adapter_config.json" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "--temperature=-1"]) == 2
    assert "temperature is -1.0; it must be at least 0" in capsys.readouterr().err
    assert main(["chat"]) == 2
    assert "chat: the following arguments are required: RUN|ADAPTER" in capsys.readouterr().err
