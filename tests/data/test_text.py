"""Text data: workers, figures, examples as people read them, and the command line."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from lora_lightning.data import Completions, LabelledText

ROWS = [{"prompt": "a b c"[: 1 + 2 * (n % 3)], "completion": "d e f g"[: 1 + 2 * (n % 4)]} for n in range(22)]


@pytest.fixture
def data(write, causal_tokenizer) -> Completions:
    return Completions(
        train=write("train.json", ROWS),
        validation=write("dev.json", ROWS[:5]),
        tokenizer=causal_tokenizer,
        batch_size=2,
        seed=3,
    )


def test_workers_are_quiet(data, capfd, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    data.num_workers = 2
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 11
    assert capfd.readouterr().err == ""


def test_command_line_knows_every_setting(capsys):
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    parsed = parser.parse_args(["--data=LabelledText", "--data.max_length=7", "--data.text=sentence"])
    data = parser.instantiate(parsed).data
    assert isinstance(data, LabelledText)
    assert (data.max_length, data.text, data.batch_size) == (7, "sentence", 16)
    several = ["--data=LabelledText", "--data.train={a.csv: 2, b.csv: 0.5}", "--data.test=[c.csv, d.csv]"]
    sources = parser.instantiate(parser.parse_args(several)).data.sources
    assert (sources.train, sources.test, sources.predict) == ({"a.csv": 2.0, "b.csv": 0.5}, ["c.csv", "d.csv"], None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=PyDocs"])
    shown = capsys.readouterr().out
    assert "--data.validation_fraction" not in shown
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=Completions"])
    shown = capsys.readouterr().out
    assert "Fraction of the training examples held out" in shown
    assert "Prompt built from columns" in shown
