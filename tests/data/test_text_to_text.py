"""Sources and targets."""

from __future__ import annotations

import pytest
from toy_runs import WORDS, save_tokenizer

from lora_lightning.data import TextToText
from lora_lightning.data.inspect import show_examples
from lora_lightning.errors import DataError, SettingsError


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path)
    rows = [(WORDS[i % 9], WORDS[i % 7], WORDS[(i * i) % 11]) for i in range(24)]
    lines = ["source,target", *(f"{a} {b} {c} w2{i},{c} {b}" for i, (a, b, c) in enumerate(rows))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def data_of(folder, **settings) -> TextToText:
    options = {"train": str(folder / "rows.csv"), "validation": str(folder / "rows.csv"), "tokenizer": str(folder)}
    return TextToText(**{**options, "batch_size": 4, **settings})


def test_data(folder):
    data = data_of(folder, prefix="w39 ", max_length=4, max_target_length=2)
    data.setup("fit")
    tokenizer = data.tokenizer_object
    row = data.examples("train")[0]
    assert tokenizer.decode(row["input_ids"]) == "w39 w0 w0 w0"
    assert tokenizer.decode(row["labels"]) == "w0 w0"
    assert row["truncated"]
    for batch in data.train_dataloader():
        assert int(batch["window_tokens"]) == int((batch["labels"] != -100).sum()) == 8
    assert show_examples(data, 1).splitlines()[-3:] == [
        "--- train example 0: 4 tokens to 2",
        "source  w39 w0 w0 w0",
        "target  w0 w0",
    ]
    with pytest.raises(SettingsError, match=r"TextToText.max_target_length is 1; it must be at least 2"):
        data_of(folder, max_target_length=1)
    with pytest.raises(DataError, match=r'TextToText.target is "goal"; rows.csv has the columns source, target'):
        data_of(folder, target="goal").setup("fit")
