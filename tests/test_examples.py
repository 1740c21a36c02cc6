"""Scripts in examples/ run, at a small size."""

from __future__ import annotations

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_runs import encoder_folder

from ll_demo import pydocs

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
def test_learning_and_forgetting_of_three_ways_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forgetting.py", "--steps", "4", "--output", "out"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "forgetting.py"), run_name="__main__")
    assert end.value.code == 0
    for name, label in (("full-fine-tuning", "full fine-tuning"), ("LoRA-rank-2", "LoRA, rank 2")):
        content = json.loads((tmp_path / "out" / name / "forgetting.json").read_text())
        assert (content["label"], content["records"][0]["when"]) == (label, "before")
        assert set(content["records"][-1]["sets"]) == {"source", "target"}
    assert "accuracy before" in capsys.readouterr().out
    assert (tmp_path / "out" / "analysis-spectrum.png").is_file()
    assert (tmp_path / "out" / "analysis-forgetting.png").is_file()


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


@pytest.mark.slow
def test_text_classification_by_plain_calls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pydocs, "library_docstrings", functools.cache(pydocs.library_docstrings))
    folder = encoder_folder(tmp_path / "encoder", labels=8)
    words = ["--steps", "6", "--limit", "32", "--pretrained", str(folder), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *words])
    runpy.run_path(str(EXAMPLES / "text_classification.py"), run_name="__main__")
    out = capsys.readouterr().out
    for found in ("Low-rank", "truncated", "memory: ", "4 layers adapted", "val_accuracy"):
        assert found in out, found
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 33
    assert (tmp_path / "out" / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_chat(tmp_path, monkeypatch, capsys):
    ask = "What day comes before Monday?"
    monkeypatch.setattr(sys, "argv", ["chat.py", "--output", str(tmp_path), "--ask", ask])
    runpy.run_path(str(EXAMPLES / "chat.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "14 layers adapted" in out
    assert out.endswith(f"user: {ask}\nassistant: Sunday.\n")
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.slow
def test_image_classification(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--steps", "200", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "image_classification.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "12 layers adapted" in out
    [accuracy] = re.findall(r"val_accuracy +│ +([0-9.]+)", out)
    assert float(accuracy) > 0.3  # chance: 0.2
    [same, every] = re.findall(r"merged: (\d+) of (\d+) images", out)[0]
    assert int(same) >= 0.99 * int(every) > 300
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


def test_plain_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_torch.py", "--steps", "20", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "plain_torch.py"), run_name="__main__")
    before, sparse, staged = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert before < min(sparse, staged)
    tensors = load_file(tmp_path / "sparse" / "adapter.safetensors")
    assert [int((tensors["0.adapters.default.lora_A"] != 0).sum(1).max())] == [32]
    assert any(".shifts." in name for name in load_file(tmp_path / "in_stages" / "adapter.safetensors"))


@pytest.mark.slow
def test_knowledge_editing(monkeypatch, capsys, test_data):
    folder = test_data / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    monkeypatch.setattr(sys, "argv", ["knowledge_editing.py", str(folder), "--steps", "30", "--seeds", "0"])
    runpy.run_path(str(EXAMPLES / "knowledge_editing.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if "edit success" in line]
    assert [line.split()[0] for line in lines] == ["RoseLoRA", "LoRA"]
    values = [dict(re.findall(r"([a-z -]+) ([0-9.]+) ±", line)) for line in lines]
    for found in ({name.strip(): float(value) for name, value in each.items()} for each in values):
        assert found["before"] < 0.3 < found["edit success"]
        assert found["drift"] > 0
        assert found["non-zero"] <= 2300


@pytest.mark.slow
def test_what_a_cascade_keeps(monkeypatch, capsys):
    """Factors grow by a rank a stage, cut ones stay at two, dense ones are a matrix and the original throughout."""
    monkeypatch.setattr(sys, "argv", ["measure_cascade.py", "--layers", "5", "--width", "24", "--stages", "4"])
    found = runpy.run_path(str(EXAMPLES / "measure_cascade.py"))
    rank, layers, width, stages = 2, 5, 24, 4
    pair, scales = 4 * rank * 2 * width, 4 * 2 * rank  # bytes of a stage's factors, and of its two rows of weights
    whole, cut = (found["measure"](layers, width, stages, rank, bound) for bound in (None, 2 * rank))
    assert whole.bytes == [layers * stage * (pair + scales) for stage in range(1, stages + 1)]
    assert cut.bytes == [layers * min(stage, 2) * (pair + scales) for stage in range(1, stages + 1)]
    assert cut.errors[:2] == [0.0, 0.0]
    assert 0 < cut.errors[2] < cut.errors[3] < 1
    dense = found["measure"](layers, width, stages, 4 * rank, None)
    assert dense.bytes == [layers * 2 * 4 * width * width] * stages
    found["main"]()
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == stages + 2
