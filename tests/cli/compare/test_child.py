from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_comparison import words

from lora_lightning.callbacks.forgetting import FILENAME, read_course
from lora_lightning.cli.compare.child import BESIDE, Spec, main
from lora_lightning.cli.compare.measured import MEASURED, ROWS
from lora_lightning.cli.compare.plan import quiet


def spec(tmp_path, **changed):
    folder = tmp_path / "run"
    folder.mkdir()
    given = {"words": [*quiet(), *words(tmp_path)], "hold_out": 0.0, "keep_rows": True, "also": [], **changed}
    Spec(**given).write(folder)
    assert Spec.read(folder) == Spec(**given)
    return folder


def test_a_final_run_leaves_rows_whose_mean_is_the_metric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = spec(tmp_path, also=[*words(tmp_path)])
    assert main([str(folder)]) == 0
    value = json.loads((folder / "summary.json").read_text())["values"]["accuracy"]
    with np.load(folder / ROWS) as rows:
        assert rows["sums"].sum() / rows["counts"].sum() == pytest.approx(value)
    cost = json.loads((folder / MEASURED).read_text())
    assert cost["steps"] == 6
    course = read_course(folder / FILENAME)
    assert [one.when for one in course.records][::3] == ["before", "after"]
    assert course.values(BESIDE, "accuracy")[-1] == (6, pytest.approx(value))
    assert course.changes(BESIDE, "loss")[-1][1] != 0
    assert cost["peak_bytes"] > 2**20


def test_a_tuning_run_never_reads_the_validation_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = words(tmp_path)
    (tmp_path / "validation.csv").unlink()
    folder = spec_without_rows(tmp_path, given)
    assert main([str(folder)]) == 0
    assert not (folder / ROWS).exists()


def spec_without_rows(tmp_path: Path, given: list[str]) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    Spec([*quiet(), *given], 0.3, False, []).write(folder)
    return folder


def test_an_error_is_one_line_and_a_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = spec(tmp_path, words=[*words(tmp_path), "--model.method.rank", "-1"])
    assert main([str(folder)]) == 2
    assert "error: " in capsys.readouterr().err
