"""Scripts in examples/ run, at a small size."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path

import pytest
from training import encoder_folder

from lora_lightning.data import pydocs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_decomposition_of_three_ways_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pydocs, "library_docstrings", functools.cache(pydocs.library_docstrings))
    monkeypatch.chdir(tmp_path)
    folder = encoder_folder(tmp_path / "encoder")
    words = ["--steps", "4", "--limit", "16", "--pretrained", str(folder), "--output", "out", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["decomposition.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "decomposition.py"), run_name="__main__")
    assert end.value.code == 0
    out = tmp_path / "out"
    for name, label in (("full", "full fine-tuning"), ("lora", "LoRA"), ("dora", "DoRA")):
        content = json.loads((out / name / "decomposition.json").read_text())
        assert content["label"] == label
        assert [record["step"] for record in content["records"]] == [1, 2, 3, 4]
        assert len(content["records"][0]["layers"]) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if " query " in line or " value " in line]
    assert len(lines) == 6
    assert (out / "analysis.png").is_file()


@pytest.mark.slow
def test_real_runs_print_a_table_and_go_on_where_they_stopped(tmp_path, monkeypatch, capsys, test_data):
    monkeypatch.chdir(tmp_path)
    words = ["--data-dir", str(test_data / "data"), "--output", "real", "--seeds", "0", "--steps", "2"]
    for runs, rows in (("pairs", 1), ("pairs,boolq", 2)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["real_runs.py", *words, "--runs", runs])
        runpy.run_path(str(EXAMPLES / "real_runs.py"), run_name="__main__")
        found = [json.loads(line) for line in (tmp_path / "real" / "results.jsonl").read_text().splitlines()]
        assert [row["run"] for row in found] == runs.split(",")
        assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == rows + 1
    assert 0 <= found[1]["before"]["accuracy"] <= 100
    assert found[1]["steps"] == 2


# peft 0.21.2 reads a name that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.slow
def test_step_time_and_memory_beside_peft(tmp_path, monkeypatch, capsys):
    """On the CPU, where it measures no memory; a second call measures only what is missing."""
    words = ["--output", str(tmp_path / "gpu.jsonl"), "--device", "cpu", "--models", "tiny", "--steps", "2"]
    for methods, rows in (("DoRA", 4), ("DoRA,RoseLoRA", 6)):
        monkeypatch.setattr(sys, "argv", ["measure_gpu.py", *words, "--methods", methods])
        runpy.run_path(str(EXAMPLES / "measure_gpu.py"), run_name="__main__")
        found = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
        assert len(found) == rows
    assert found[0]["trained"] == found[1]["trained"]
    assert all(row["step_ms"] > 0 and row["steps"] == 2 for row in found)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(table) == 2 + 4
    assert "peft" in {row["library"] for row in found if row["method"] == "DoRA"}
