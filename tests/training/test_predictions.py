"""Files of predictions: read back, refused, with names of classes."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_lightning.errors import RunFolderError, SettingsError
from lora_lightning.training.predictions import WritePredictions, write_rows


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_predictions_of_difficult_text_read_back(tmp_path, ending):
    rows = [
        {"index": 0, "text": 'a "quoted", text\nof two lines', "prediction": "ü"},
        {"index": 1, "text": "", "prediction": "b"},
    ]
    path = tmp_path / f"out{ending}"
    write_rows(path, rows)
    if ending == ".csv":
        with path.open(newline="") as file:
            read = [{**row, "index": int(row["index"])} for row in csv.DictReader(file)]
    else:
        import json

        read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == rows


def test_predictions_that_cannot_be_written(tmp_path):
    with pytest.raises(SettingsError, match=r'--output is "x.parquet"; it must end in .csv or .jsonl'):
        WritePredictions("x.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        write_rows(Path(tmp_path / "file" / "out.csv"), [{"a": 1}])


def test_class_numbers_are_written_as_names(tmp_path):
    class Data:
        label_names = ("first", "second")

        def inputs(self, split):
            return [{"text": "a", "label": 1}, {"text": "b", "label": 0}]

    writer = WritePredictions(tmp_path / "out.csv")
    for rows in (
        [{"index": 1, "prediction": "first"}],
        [{"index": 0, "prediction": "second"}],
        [{"index": 1, "prediction": "first"}],
    ):
        writer.on_predict_batch_end(None, None, rows, None, 0)
    writer.on_predict_end(SimpleNamespace(datamodule=Data(), is_global_zero=True), None)
    with (tmp_path / "out.csv").open() as file:
        assert [(row["text"], row["label"], row["prediction"]) for row in csv.DictReader(file)] == [
            ("a", "second", "second"),
            ("b", "first", "first"),
        ]
